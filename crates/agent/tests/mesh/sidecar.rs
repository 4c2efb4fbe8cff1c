//! A sidecar that only listens: it takes every order, writes down what it was told in `orders` in its records directory,
//! and acknowledges every view except those that show a service named `refused`.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::FromRawFd, unix::net::UnixStream},
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::BytesMut;
use countersign_api::mesh::{InstanceRevision, IssuedToken, RecordsAnswer};
use countersign_api::sidecar::{
    AGENT_FD, BROKER_FD, Configure, Listening, Metrics, Probed, ProxyFrames, SidecarMessage, SidecarOrder, Span, Spans,
    sidecar_message::Message, sidecar_order::Order,
};
use countersign_core::{canonical::Digest, identity::ServiceName, view::View};
use tokio_util::codec::{Decoder, Encoder};

struct Sidecar {
    agent: Arc<Mutex<UnixStream>>,
    orders: Option<File>,
    revision: u64,
    held: Vec<TcpListener>,
    probed: Option<String>, // the page to show next
}

/// The hidden subcommand.
#[allow(unsafe_code, reason = "a descriptor that was inherited is known by its number only")]
pub fn main() -> ExitCode {
    // SAFETY: the agent passes its end under this number, and nothing else here uses it.
    let mut agent = unsafe { UnixStream::from_raw_fd(AGENT_FD) };
    let said = Arc::new(Mutex::new(agent.try_clone().unwrap()));
    let mut sidecar = Sidecar { agent: said, orders: None, revision: 0, held: Vec::new(), probed: None };
    let (mut frames, mut buffer, mut chunk) = (ProxyFrames::default(), BytesMut::new(), [0; 65536]);
    loop {
        while let Some(SidecarOrder { order: Some(order) }) = frames.decode(&mut buffer).unwrap() {
            sidecar.take(order);
        }
        match agent.read(&mut chunk) {
            Ok(0) | Err(_) => return ExitCode::SUCCESS, // the agent is gone
            Ok(n) => buffer.extend_from_slice(&chunk[..n]),
        }
    }
}

fn say(agent: &Mutex<UnixStream>, message: Message) {
    let mut buffer = BytesMut::new();
    ProxyFrames::default().encode(SidecarMessage { message: Some(message) }, &mut buffer).unwrap();
    let _ = agent.lock().unwrap().write_all(&buffer);
}

impl Sidecar {
    fn note(&mut self, line: String) {
        if let Some(file) = &mut self.orders {
            file.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Configure(configure) => self.configure(configure),
            Order::Identity(identity) => {
                self.note(format!("identity {}", hex::encode(&identity.chain_der[0])));
                self.tokens(&hex::encode(Digest::of(&identity.chain_der[0]).0), &identity.tokens);
            }
            Order::Tokens(tokens) => self.tokens(&hex::encode(&tokens.certificate_sha256), &tokens.tokens),
            Order::Signals(signals) => {
                let revoked: Vec<String> = signals.revoked.iter().map(|one| hex::encode(&one.serial)).collect();
                self.note(format!("signals {} {}", signals.sequence, revoked.join(",")));
                say(&self.agent, Message::Heeded(signals.sequence));
            }
            Order::Bundle(bundle) => self.note(format!("bundle {}", bundle.trust_domain)),
            Order::ViewJson(json) => {
                let view: View = serde_json::from_slice(&json).unwrap();
                let services: Vec<&str> = view.services.keys().map(ServiceName::as_str).collect();
                self.note(format!("view {} {}", view.revision, services.join(",")));
                let error = if services.contains(&"refused") { "it shows `refused`" } else { "" };
                if error.is_empty() {
                    self.revision = view.revision.0;
                }
                self.applied(error);
            }
            Order::Revision(revision) => {
                self.note(format!("revision {revision}"));
                self.revision = revision;
                self.applied("");
            }
            Order::Endpoints(endpoints) => {
                for service in endpoints.services {
                    let addresses: Vec<_> = service.endpoints.into_iter().map(|endpoint| endpoint.address).collect();
                    self.note(format!("endpoints {} {}", service.service, addresses.join(",")));
                }
            }
            Order::Fresh(fresh) => self.note(format!("fresh {}", fresh.age_ms)),
            Order::RecordsQuery(query) => {
                let records_json = vec![format!("{{\"at_ms\":{}}}", std::process::id()).into()];
                let answer = RecordsAnswer { query: query.query, records_json, last: true, error: String::new() };
                say(&self.agent, Message::Records(answer));
            }
            Order::MetricsQuery(_) => {
                self.note("metrics_query".into());
                let page = self.probed.take().unwrap_or_else(|| "page".into());
                say(&self.agent, Message::Metrics(Metrics { page, began_ns: 1, at_ns: 2 }));
                say(&self.agent, Message::Spans(Spans { spans: vec![Span { span_id: 7, ..Span::default() }] }));
            }
            Order::Probe(nonce) => {
                let trace_id = hex::encode(&nonce);
                self.note(format!("probe {trace_id}"));
                self.probed = Some(format!("countersign_probes_total 1 # {{trace_id=\"{trace_id}\"}} 1"));
                let spans = vec![
                    Span { span_id: 7, ..Span::default() },
                    Span { trace_id: nonce.clone(), span_id: 8, ..Span::default() },
                ];
                say(&self.agent, Message::Spans(Spans { spans }));
                say(&self.agent, Message::Probed(Probed { nonce, error: String::new() }));
            }
            Order::Drain(drain) => {
                self.note(format!("drain {}", drain.within_ms));
                say(&self.agent, Message::Drained("nothing was open".into()));
                std::process::exit(0);
            }
        }
    }

    fn tokens(&mut self, certificate: &str, tokens: &[IssuedToken]) {
        for IssuedToken { service, token, .. } in tokens {
            self.note(format!("token {certificate} {service} {token}"));
        }
        self.note(format!("tokens {}", tokens.len()));
    }

    fn applied(&self, error: &str) {
        let applied = InstanceRevision { revision: self.revision, error: error.into(), ..InstanceRevision::default() };
        say(&self.agent, Message::Applied(applied));
    }

    fn configure(&mut self, configure: Configure) {
        let file = Path::new(&configure.records_dir).join("orders");
        self.orders = Some(OpenOptions::new().create(true).append(true).open(file).unwrap());
        self.note(format!("pid {}", std::process::id()));
        if let Some(sampling) = configure.sampling {
            self.note(format!("sampling {} {}", sampling.follow_parent, sampling.ratio));
        }
        if configure.isolated {
            let broker = std::fs::read_link(format!("/proc/self/fd/{BROKER_FD}")).is_ok();
            self.note(format!("isolated broker={broker}"));
        }
        let isolated = configure.isolated;
        let mut listen = |at: &str| {
            if isolated && !at.ends_with(":0") {
                return at.to_owned();
            }
            let listener = TcpListener::bind(at).unwrap();
            let address = listener.local_addr().unwrap();
            self.held.push(listener);
            address.to_string()
        };
        let listening = Listening {
            inbound: listen(&configure.inbound_listen),
            outbound_http: listen(&configure.outbound_http_listen),
            upstreams: configure.upstreams.iter().map(|(service, at)| (service.clone(), listen(at))).collect(),
            admin: format!("http://{}", listen(&configure.admin_listen)),
        };
        self.note(format!("listening {} {}", listening.inbound, listening.outbound_http));
        say(&self.agent, Message::Listening(listening));
        let agent = self.agent.clone();
        if let Ok(app) = configure.app_address.parse::<SocketAddr>()
            && !isolated
        {
            std::thread::spawn(move || {
                let mut ready = false;
                loop {
                    let accepts = TcpStream::connect_timeout(&app, Duration::from_secs(1)).is_ok();
                    if accepts != ready {
                        ready = accepts;
                        say(&agent, Message::AppReady(ready));
                    }
                    std::thread::sleep(Duration::from_millis(30));
                }
            });
        }
    }
}
