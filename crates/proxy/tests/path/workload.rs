//! Workloads to stand behind a sidecar, well-behaved and not.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A workload and the requests it saw.
pub struct Workload {
    pub address: SocketAddr,
    pub seen: Arc<AtomicUsize>,
}

impl Workload {
    pub fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }

    /// Echoes what it is asked: see [`answer`].
    pub async fn http() -> Self {
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        let address = Self::listen(move |stream| {
            let count = count.clone();
            async move {
                let service = service_fn(move |request| {
                    count.fetch_add(1, Ordering::SeqCst);
                    async move { Ok::<_, Infallible>(answer(request).await) }
                });
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await;
            }
        })
        .await;
        Self { address, seen }
    }

    /// Answers every request with exactly these bytes, then closes; an empty answer is a reset.
    pub async fn raw(answer: &'static [u8]) -> Self {
        Self::raw_until(answer, answer.is_empty()).await
    }

    /// Answers every request with exactly these bytes, then resets the connection.
    pub async fn raw_until_reset(answer: &'static [u8]) -> Self {
        Self::raw_until(answer, true).await
    }

    async fn raw_until(answer: &'static [u8], resets: bool) -> Self {
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        let address = Self::listen(move |mut stream: TcpStream| {
            let count = count.clone();
            async move {
                let mut buffer = vec![0; 65_536];
                let _ = stream.read(&mut buffer).await;
                count.fetch_add(1, Ordering::SeqCst);
                if !answer.is_empty() {
                    let _ = stream.write_all(answer).await;
                    tokio::time::sleep(Duration::from_millis(50)).await; // a reset takes with it what was not read yet
                }
                if resets {
                    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                }
            }
        })
        .await;
        Self { address, seen }
    }

    /// Echoes bytes until the other end finishes, then says goodbye.
    pub async fn tcp() -> Self {
        let address = Self::listen(|mut stream: TcpStream| async move {
            let (mut reader, mut writer) = stream.split();
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = writer.write_all(b"goodbye").await;
        })
        .await;
        Self { address, seen: Arc::default() }
    }

    /// Speaks HTTP/2 and announces a body of eight bytes, but sends as many as the path says, and resets the stream then
    /// if the path asks for it: `/5`, `/5/reset`.
    pub async fn lying_http2() -> Self {
        let address = Self::listen(|stream: TcpStream| async move {
            let Ok(mut connection) = h2::server::handshake(stream).await else { return };
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let mut path = request.uri().path()[1..].split('/');
                let (count, resets) = (path.next().unwrap().parse().unwrap(), path.next().is_some());
                let head = Response::builder().header("content-type", "application/grpc").header("content-length", 8);
                let mut send = respond.send_response(head.body(()).unwrap(), false).unwrap();
                send.send_data(Bytes::from(vec![7; count]), !resets).unwrap();
                if resets {
                    send.send_reset(h2::Reason::CANCEL);
                }
            }
        })
        .await;
        Self { address, seen: Arc::default() }
    }

    /// Echoes the messages of a gRPC call, one for one, and ends with trailers.
    pub async fn grpc() -> Self {
        let address = Self::listen(|stream: TcpStream| async move {
            let Ok(mut connection) = h2::server::handshake(stream).await else { return };
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let head = Response::builder().header("content-type", "application/grpc");
                    let mut send = respond.send_response(head.body(()).unwrap(), false).unwrap();
                    let mut body = request.into_body();
                    while let Some(Ok(bytes)) = body.data().await {
                        let _ = body.flow_control().release_capacity(bytes.len());
                        if send.send_data(bytes, false).is_err() {
                            return;
                        }
                    }
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    let _ = send.send_trailers(trailers);
                });
            }
        })
        .await;
        Self { address, seen: Arc::default() }
    }

    async fn listen<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream));
            }
        });
        address
    }
}

fn full(text: impl Into<Bytes>) -> Body {
    http_body_util::Full::new(text.into()).boxed_unsync()
}

fn stream(frames: impl futures_util::Stream<Item = Bytes> + Send + 'static) -> Body {
    StreamBody::new(frames.map(|bytes| Ok::<_, Infallible>(Frame::data(bytes)))).boxed_unsync()
}

/// `/events` streams without end, `/bytes/N` sends N bytes, `/count` counts the body, `/stall` never answers, `/ws`
/// echoes the bytes of a WebSocket, `/forge` claims to be the mesh; everything else says what it was asked.
async fn answer(mut request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let last = path.rsplit('/').next().unwrap_or_default();
    match path.split('/').nth(1).unwrap_or_default() {
        "events" => {
            let ticks = futures_util::stream::unfold(0u32, |number| async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                Some((Bytes::from(format!("data: {number}\n\n")), number + 1))
            });
            Response::builder().header("content-type", "text/event-stream").body(stream(ticks)).unwrap()
        }
        "bytes" => {
            let count: usize = last.parse().unwrap();
            let chunk = Bytes::from(vec![7u8; 64 * 1024]);
            let chunks = futures_util::stream::iter((0..count / chunk.len()).map(move |_| chunk.clone()));
            Response::new(stream(chunks))
        }
        "count" => {
            let mut count = 0;
            while let Some(Ok(frame)) = request.body_mut().frame().await {
                count += frame.data_ref().map_or(0, Bytes::len);
            }
            Response::new(full(count.to_string()))
        }
        "stall" => std::future::pending().await,
        "forge" => Response::builder()
            .header("countersign-reason", "denied")
            .header("countersign-caller", "spiffe://shop.example/admin")
            .header("connection", "x-private")
            .header("x-private", "1")
            .body(full("forged"))
            .unwrap(),
        "ws" => {
            let key = request.headers()["sec-websocket-key"].clone();
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                let mut buffer = [0; 1024];
                while let Ok(count @ 1..) = io.read(&mut buffer).await {
                    let _ = io.write_all(&buffer[..count]).await;
                }
            });
            let mut sha1 = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY);
            sha1.update(key.as_bytes());
            sha1.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
            use base64::Engine;
            let accept = base64::engine::general_purpose::STANDARD.encode(sha1.finish().as_ref());
            Response::builder()
                .status(101)
                .header("connection", "upgrade")
                .header("upgrade", "websocket")
                .header("sec-websocket-accept", accept)
                .body(full(""))
                .unwrap()
        }
        _ => {
            let mut text = format!("{} {}\n", request.method(), request.uri());
            for (name, value) in request.headers() {
                text.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
            }
            Response::new(full(text))
        }
    }
}
