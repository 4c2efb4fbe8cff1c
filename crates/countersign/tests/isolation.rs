//! A workload that the binary's own launcher started, and the sidecar's rooms that reach into its namespace: what agent
//! and proxy, which never see each other, do together. Nothing is judged here.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use countersign_agent::isolate::{DNS_ADDRESS, LaunchSpec, Launcher, prepare, probe};
use countersign_proxy::{dns, listen::Sockets};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

const BINARY: &str = env!("CARGO_BIN_EXE_countersign");
const WITHIN: Duration = Duration::from_secs(20);

/// A workload that runs `script`; `None`, and the reason printed, where the kernel refuses namespaces.
async fn isolated(script: &str, data_dir: &Path) -> Option<Launcher> {
    let isolation = probe(Path::new(BINARY), data_dir).await;
    if !isolation.available {
        eprintln!("not proven, this host does not separate workloads: {}", isolation.note);
        return None;
    }
    let spec = LaunchSpec {
        executable: BINARY.into(),
        command: ["bash", "-c", script].map(str::to_owned).to_vec(),
        dir: "/".into(),
        env: BTreeMap::new(),
        isolate: true,
        data_dir: data_dir.to_owned(),
    };
    let launcher = prepare(spec).await.unwrap();
    launcher.start(None).await.unwrap();
    Some(launcher)
}

#[tokio::test]
async fn a_workload_reaches_a_service_by_its_name_and_only_its_sidecar_hears_it() {
    let data_dir = tempfile::tempdir().unwrap();
    let script = "until cat < /dev/tcp/ledger.mesh/80; do sleep 0.05; done 2>/dev/null; getent hosts other.mesh || echo -n ' alone'";
    let Some(mut workload) = isolated(script, data_dir.path()).await else { return };
    let sockets = Sockets::brokered(workload.broker.take().unwrap()).unwrap();

    let ledger = Ipv4Addr::new(127, 81, 1, 7);
    let lookup = move |service: &str| (service == "ledger").then_some(ledger);
    let questions = UdpSocket::from_std(sockets.bind_udp(SocketAddr::from((DNS_ADDRESS, 53))).unwrap()).unwrap();
    let connections = TcpListener::from_std(sockets.listen(SocketAddr::from((DNS_ADDRESS, 53))).unwrap()).unwrap();
    let names = [tokio::spawn(dns::serve_udp(questions, lookup)), tokio::spawn(dns::serve_tcp(connections, lookup))];

    let listener = TcpListener::from_std(sockets.listen(SocketAddr::from((ledger, 80))).unwrap()).unwrap();
    let heard = async {
        let (mut caller, from) = listener.accept().await.unwrap();
        assert!(from.ip().is_loopback(), "{from}");
        caller.write_all(b"the sidecar speaks").await.unwrap();
        drop(caller);
        let mut said = String::new();
        let mut stdout = workload.stdout.take().unwrap();
        workload.exited().await;
        drop(workload); // and with it the last process that could write
        stdout.read_to_string(&mut said).await.unwrap();
        said
    };
    let said = tokio::time::timeout(WITHIN, heard).await.unwrap();
    assert_eq!(said, "the sidecar speaks alone");
    names.iter().for_each(|task| task.abort());
}

#[tokio::test]
async fn a_port_of_a_namespace_is_reached_through_its_broker_and_from_nowhere_else() {
    let data_dir = tempfile::tempdir().unwrap();
    let Some(mut workload) = isolated("sleep 1000", data_dir.path()).await else { return };
    let Some(mut neighbour) = isolated("sleep 1000", data_dir.path()).await else { return };
    let sockets = Sockets::brokered(workload.broker.take().unwrap()).unwrap();
    let elsewhere = Sockets::brokered(neighbour.broker.take().unwrap()).unwrap();

    let app = TcpListener::from_std(sockets.listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap()).unwrap();
    let address = app.local_addr().unwrap();
    assert!(TcpStream::connect(address).await.is_err(), "the host reached {address} inside");
    assert!(elsewhere.connect(address).await.is_err(), "another workload reached {address}");
    let reached = async { tokio::join!(sockets.connect(address), app.accept()) };
    let (connected, accepted) = tokio::time::timeout(WITHIN, reached).await.unwrap();
    assert_eq!(connected.unwrap().local_addr().unwrap(), accepted.unwrap().1);
}
