//! A load of new connections: mutual TLS 1.3 without resumption, then HTTP/2 until the other side's SETTINGS are there, which
//! no proxy sends before it has accepted our certificate. It verifies nothing itself, to leave the proxy the bottleneck.
//!
//! `handshakes ADDRESS CHAIN.pem KEY.pem x25519|x25519mlkem768 SECONDS CLIENTS` prints one JSON object.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::aws_lc_rs::{self, kx_group},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// RFC 9113, section 3.4: the preface, then an empty SETTINGS frame.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const SETTINGS: u8 = 4;

#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unreachable!("TLS 1.3 only")
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

fn config(chain: &str, key: &str, group: &str) -> Arc<ClientConfig> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![match group {
        "x25519" => kx_group::X25519,
        "x25519mlkem768" => kx_group::X25519MLKEM768,
        other => panic!("`{other}` is no group: x25519 or x25519mlkem768"),
    }];
    let chain = CertificateDer::pem_file_iter(chain).unwrap().collect::<Result<_, _>>().unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap())
        .unwrap();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

async fn connect(address: &str, config: Arc<ClientConfig>) -> std::io::Result<()> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from("countersign.invalid").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await?;
    stream.write_all(HELLO).await?;
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).await?;
    assert_eq!(frame[3], SETTINGS, "the first frame of a server is SETTINGS");
    stream.shutdown().await
}

fn main() {
    // `cargo bench` adds a word of its own.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let [address, chain, key, group, seconds, clients] = &words[..] else {
        eprintln!("nothing to connect to: see bench/run.py, which starts the proxies");
        return;
    };
    let config = config(chain, key, group);
    let end = Instant::now() + Duration::from_secs(seconds.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let done: u64 = runtime.block_on(async {
        let one_after_the_other = (0..clients.parse().unwrap()).map(|_| async {
            let mut done = 0;
            while Instant::now() < end {
                connect(address, config.clone()).await.expect("every connection is accepted");
                done += 1;
            }
            done
        });
        futures_util::future::join_all(one_after_the_other).await.into_iter().sum()
    });
    println!("{}", serde_json::json!({ "connections": done }));
}
