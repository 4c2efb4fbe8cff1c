//! A workload that asks for its identities, and strangers who do. This program is that workload too (`asks`).

use std::{path::Path, process::ExitCode, sync::atomic::Ordering, time::Duration};

use countersign_agent::AgentEvent;
use countersign_api::workload::{
    ENDPOINT_VARIABLE, JwtBundlesRequest, JwtsvidRequest, SECURITY_HEADER, ValidateJwtsvidRequest, X509BundlesRequest,
    X509svidRequest, spiffe_workload_api_client::SpiffeWorkloadApiClient,
};
use countersign_core::{canonical::Digest, change::Change};
use hyper_util::rt::TokioIo;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

use crate::{control::declare, event, ground, name, until, workload};

async fn client(socket: &Path) -> SpiffeWorkloadApiClient<Channel> {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
    });
    SpiffeWorkloadApiClient::new(
        Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap(),
    )
}

fn with_header<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(SECURITY_HEADER, "true".parse().unwrap());
    request
}

/// What the workload does: says each X.509-SVID as it comes and why there is no more, and tries a JWT-SVID on itself.
pub fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let socket = std::env::var(ENDPOINT_VARIABLE).unwrap();
        let mut client = client(Path::new(socket.strip_prefix("unix://").unwrap())).await;
        let audience = vec!["orders".to_owned()];
        let ask = JwtsvidRequest { audience, spiffe_id: String::new() };
        let svid = client.fetch_jwtsvid(with_header(ask.clone())).await.unwrap().into_inner().svids.remove(0).svid;
        let again = client.fetch_jwtsvid(with_header(ask)).await.unwrap().into_inner().svids.remove(0).svid;
        for (audience, svid) in [("orders", svid.clone()), ("web", svid.clone()), ("orders", svid.replace('.', ".A"))] {
            let ask = ValidateJwtsvidRequest { audience: audience.into(), svid };
            let answer = client.validate_jwtsvid(with_header(ask)).await;
            println!("validated {}", answer.map_or_else(|s| format!("{:?}", s.code()), |a| a.into_inner().spiffe_id));
        }
        let mut keys = client.fetch_jwt_bundles(with_header(JwtBundlesRequest {})).await.unwrap().into_inner();
        let keys = keys.message().await.unwrap().unwrap().bundles;
        println!("jwt {} {}", svid == again, keys.keys().next().unwrap());
        let mut stream = client.fetch_x509svid(with_header(X509svidRequest {})).await.unwrap().into_inner();
        let ended = loop {
            match stream.message().await {
                Ok(Some(answer)) => {
                    let svid = &answer.svids[0];
                    let digest = Digest::of(&svid.x509_svid);
                    println!("svid {} {} {digest}", svid.spiffe_id, svid.x509_svid_key.len() > 100);
                }
                Ok(None) => break "without a word".to_owned(),
                Err(status) => break format!("{:?}", status.code()),
            }
        };
        println!("ended {ended}");
        tokio::time::sleep(Duration::from_secs(1000)).await;
    });
    ExitCode::SUCCESS
}

pub async fn a_workload_asks_for_its_identities_until_its_service_is_taken_out_of_the_mesh() {
    let ground = ground().await;
    ground.control.append(vec![declare("web")], &[]);
    ground.control.svid_seconds.store(4, Ordering::Relaxed);
    let mut spec = workload("web", "");
    spec.run = Some(vec![std::env::current_exe().unwrap().display().to_string(), "asks".into()]);
    let agent = ground.start(vec![spec]).await;
    let mut events = agent.events();
    let mut line = async || {
        event(&mut events, |event| match event {
            AgentEvent::Output { line, .. } => Some(line.clone()),
            _ => None,
        })
        .await
    };
    let domain = &ground.control.trust_domain;
    assert_eq!(line().await, format!("validated spiffe://{domain}/web"));
    assert_eq!(line().await, "validated InvalidArgument");
    assert_eq!(line().await, "validated InvalidArgument");
    assert_eq!(line().await, format!("jwt true spiffe://{domain}"));
    let mut seen = Vec::new();
    for _ in 0..3 {
        let said = line().await;
        assert!(said.starts_with(&format!("svid spiffe://{domain}/web true ")), "{said}");
        assert!(!seen.contains(&said), "an SVID was told twice");
        seen.push(said);
    }
    let proxys: Vec<String> = ground.words_of("web", "identity");
    assert!(!proxys.is_empty() && seen.iter().all(|said| !proxys.iter().any(|proxys| said.ends_with(proxys))));
    ground.control.append(vec![Change::RemoveService { name: name("web") }], &[]);
    let ended = loop {
        let said = line().await;
        if !said.starts_with("svid ") {
            break said;
        }
    };
    assert_eq!(ended, "ended PermissionDenied");
    agent.stop(Duration::ZERO).await;
}

/// PROVES (attested-by-launch)
/// PROVES (asked-by-a-workload)
pub async fn a_process_that_the_agent_did_not_launch_has_no_identity() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![workload("web", "exec sleep 1000")]).await;
    ground.enforced("web", revision).await;
    let socket = ground.data_dir().join("agent/web-1.sock");
    until("its socket", || socket.exists()).await;
    let mut client = client(&socket).await;
    async fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, expected: Code) {
        let status = answer.unwrap_err();
        assert_eq!(status.code(), expected, "{status}");
    }
    let ask = || JwtsvidRequest { audience: vec!["orders".into()], spiffe_id: String::new() };
    refused(client.fetch_jwtsvid(with_header(ask())).await, Code::PermissionDenied).await;
    refused(client.fetch_x509svid(with_header(X509svidRequest {})).await, Code::PermissionDenied).await;
    refused(client.fetch_x509_bundles(with_header(X509BundlesRequest {})).await, Code::PermissionDenied).await;
    let validate = ValidateJwtsvidRequest { audience: "orders".into(), svid: "a.b.c".into() };
    refused(client.validate_jwtsvid(with_header(validate)).await, Code::PermissionDenied).await;
    // Whoever can be made to send a request does not send the header.
    refused(client.fetch_jwtsvid(ask()).await, Code::InvalidArgument).await;
    let mut twice = with_header(ask());
    twice.metadata_mut().append(SECURITY_HEADER, "true".parse().unwrap());
    refused(client.fetch_jwtsvid(twice).await, Code::InvalidArgument).await;
    assert!(!ground.control.issued.lock().iter().any(|issued| issued.contains(" for ")));
    agent.stop(Duration::ZERO).await;
}
