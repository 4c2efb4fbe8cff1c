//! A workload that asks for its identities, and strangers who do. This program is that workload too: as software written for SPIFFE
//! (`asks`), as an Envoy (`asks-as-envoy`), and with the crate `spiffe` (`asks-by-crate`).

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::Ordering,
    time::Duration,
};

use countersign_agent::{Agent, AgentConfig, AgentEvent, WorkloadSpec, start};
use countersign_api::{
    mesh::follow_request::Message,
    sds::{
        BuildVersion, DiscoveryRequest, Node, SECRET_TYPE, Secret, SemanticVersion, SpiffeCertValidatorConfig,
        secret::Type, secret_discovery_service_client::SecretDiscoveryServiceClient,
    },
    workload::{
        ENDPOINT_VARIABLE, JwtBundlesRequest, JwtsvidRequest, SECURITY_HEADER, ValidateJwtsvidRequest,
        X509BundlesRequest, X509svidRequest, spiffe_workload_api_client::SpiffeWorkloadApiClient,
    },
};
use countersign_core::{
    canonical::Digest,
    change::Change,
    registration::Registration,
    service::{Protocol, ServiceSpec},
};
use hyper_util::rt::TokioIo;
use prost::Message as _;
use tokio::io::{AsyncBufReadExt, AsyncReadExt};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

use crate::{Ground, WITHIN, control::declare, event, ground, name, until, workload};

async fn client(socket: &Path) -> SpiffeWorkloadApiClient<Channel> {
    SpiffeWorkloadApiClient::new(channel(socket).await)
}

async fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap()
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

/// What an Envoy does: keeps a stream open for each of its secrets, takes up what comes, and asks again when a stream ends.
pub fn envoy_main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let socket = std::env::var(ENDPOINT_VARIABLE).unwrap();
        let client =
            SecretDiscoveryServiceClient::new(channel(Path::new(socket.strip_prefix("unix://").unwrap())).await);
        let keep = async |name: &'static str| {
            let mut last = String::new();
            let mut say = |said: String| {
                if said != std::mem::replace(&mut last, said.clone()) {
                    println!("{name} {said}");
                }
            };
            loop {
                let ended = keep_secret(client.clone(), name, &mut say).await;
                say(ended);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::join!(keep("default"), keep("ROOTCA"));
    });
    ExitCode::SUCCESS
}

/// Says each answer, and returns why there is no more.
async fn keep_secret(
    mut client: SecretDiscoveryServiceClient<Channel>,
    name: &str,
    say: &mut impl FnMut(String),
) -> String {
    let version = SemanticVersion { major_number: 1, minor_number: 40, patch: 0 };
    let version = Some(BuildVersion { version: Some(version) });
    let node = Some(Node { id: "edge".into(), metadata: None, user_agent_build_version: version });
    let ask = DiscoveryRequest {
        node,
        resource_names: vec![name.to_owned()],
        type_url: SECRET_TYPE.into(),
        ..DiscoveryRequest::default()
    };
    let (tell, told) = tokio::sync::mpsc::channel(4);
    tell.send(ask.clone()).await.unwrap();
    let answers = client.stream_secrets(tokio_stream::wrappers::ReceiverStream::new(told)).await;
    let mut answers = match answers {
        Ok(answers) => answers.into_inner(),
        Err(status) => return format!("ended {:?}", status.code()),
    };
    loop {
        let answer = match answers.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => return "ended without a word".to_owned(),
            Err(status) => return format!("ended {:?}", status.code()),
        };
        let secret = Secret::decode(&answer.resources[0].value[..]).unwrap();
        say(match secret.r#type.unwrap() {
            Type::TlsCertificate(certificate) => format!("certificate {}", Digest::of(&certificate.encode_to_vec())),
            Type::ValidationContext(context) => {
                let config = context.custom_validator_config.unwrap().typed_config.unwrap();
                let config = SpiffeCertValidatorConfig::decode(&config.value[..]).unwrap();
                format!("believes {}", config.trust_domains[0].name)
            }
        });
        let took = DiscoveryRequest { version_info: answer.version_info, response_nonce: answer.nonce, ..ask.clone() };
        tell.send(DiscoveryRequest { node: None, ..took }).await.unwrap();
    }
}

pub async fn an_envoy_has_its_secrets_until_its_service_is_suspended_and_again_when_it_is_resumed() {
    let ground = ground().await;
    ground.control.append(vec![declare("edge")], &[]);
    ground.control.svid_seconds.store(4, Ordering::Relaxed);
    let mut spec = workload("edge", "");
    spec.run = Some(vec![std::env::current_exe().unwrap().display().to_string(), "asks-as-envoy".into()]);
    let agent = ground.start(vec![spec]).await;
    let mut events = agent.events();
    let mut said_until = async |is_enough: &dyn Fn(&[String]) -> bool| {
        let mut said = Vec::new();
        while !is_enough(&said) {
            let line = |event: &AgentEvent| match event {
                AgentEvent::Output { line, .. } => Some(line.clone()),
                _ => None,
            };
            said.push(event(&mut events, line).await);
        }
        said
    };
    let believes = format!("ROOTCA believes {}", ground.control.trust_domain);
    let certificates = |said: &[String]| {
        let found: BTreeSet<_> = said.iter().filter(|line| line.starts_with("default certificate ")).cloned().collect();
        found.len()
    };
    said_until(&|said| said.contains(&believes) && certificates(said) == 3).await;
    let suspend = Change::SuspendService { name: name("edge"), reason: "its key was copied".into() };
    ground.control.append(vec![suspend], &[]);
    let ended = ["default ended PermissionDenied", "ROOTCA believes invalid", "ROOTCA ended PermissionDenied"];
    let said = said_until(&|said| ended.iter().all(|line| said.iter().any(|said| said == line))).await;
    assert!(!said.contains(&believes), "{said:?}");
    ground.control.append(vec![Change::ResumeService { name: name("edge") }], &[]);
    said_until(&|said| said.contains(&believes) && certificates(said) > 0).await;
    agent.stop(Duration::ZERO).await;
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
    let secrets = async |request: DiscoveryRequest| {
        SecretDiscoveryServiceClient::new(channel(&socket).await).fetch_secrets(request).await
    };
    refused(secrets(DiscoveryRequest::default()).await, Code::PermissionDenied).await;
    // Whoever can be made to send a request does not send the header.
    refused(client.fetch_jwtsvid(ask()).await, Code::InvalidArgument).await;
    let mut twice = with_header(ask());
    twice.metadata_mut().append(SECURITY_HEADER, "true".parse().unwrap());
    refused(client.fetch_jwtsvid(twice).await, Code::InvalidArgument).await;
    assert!(!ground.control.issued.lock().iter().any(|issued| issued.contains(" for ")));
    agent.stop(Duration::ZERO).await;
}

/// What registers this very program, of this very user.
fn registered(service: &str) -> Change {
    let program = std::env::current_exe().unwrap().canonicalize().unwrap();
    let uid = rustix::process::getuid().as_raw();
    let selectors = [format!("unix:uid:{uid}"), format!("unix:path:{}", program.display())];
    let selectors = selectors.iter().map(|selector| selector.parse().unwrap()).collect();
    let attest = [Registration::new(selectors, Some(name("h1"))).unwrap()].into();
    Change::DeclareService { name: name(service), spec: ServiceSpec { attest, ..ServiceSpec::new(Protocol::Http) } }
}

/// An agent with a socket for what it did not start.
async fn start_with_socket(ground: &Ground, workloads: Vec<WorkloadSpec>) -> (Agent, PathBuf) {
    let socket = ground.dir.path().join("workload.sock");
    let config = ground.config(Some(ground.control.token()), workloads);
    let agent = start(AgentConfig { workload_socket: Some(socket.clone()), ..config }).await.unwrap();
    (agent, socket)
}

/// PROVES (attested-by-selectors)
pub async fn a_process_that_the_agent_did_not_start_is_the_service_that_registers_it_and_nobody_without() {
    let ground = ground().await;
    ground.control.append(vec![declare("web")], &[]);
    ground.control.svid_seconds.store(4, Ordering::Relaxed);
    let (agent, socket) = start_with_socket(&ground, vec![]).await;
    let mut stranger = client(&socket).await;
    until_some("it is refused", async || {
        let refused = stranger.fetch_x509_bundles(with_header(X509BundlesRequest {})).await.unwrap_err();
        // Before this host knows its mesh it says so.
        (refused.code() == Code::PermissionDenied).then_some(refused)
    })
    .await;
    ground.control.append(vec![registered("edge")], &[]);
    let mut asks = tokio::process::Command::new(std::env::current_exe().unwrap());
    asks.arg("asks").env(ENDPOINT_VARIABLE, format!("unix://{}", socket.display()));
    asks.stdout(std::process::Stdio::piped()).kill_on_drop(true);
    // The change is on its way to this host: who asks before it is there is refused.
    let (mut process, mut lines) = until_some("it is registered", async || {
        let mut process = asks.spawn().unwrap();
        let mut lines = tokio::io::BufReader::new(process.stdout.take().unwrap()).lines();
        let said = lines.next_line().await.unwrap()?;
        assert_eq!(said, format!("validated spiffe://{}/edge", ground.control.trust_domain));
        Some((process, lines))
    })
    .await;
    let mut seen = BTreeSet::new();
    while seen.len() < 3 {
        let said = lines.next_line().await.unwrap().unwrap();
        if let Some(svid) = said.strip_prefix(&format!("svid spiffe://{}/edge true ", ground.control.trust_domain)) {
            assert!(seen.insert(svid.to_owned()), "an SVID was told twice");
        }
    }
    let downs = || {
        let said = ground.control.said.lock();
        let down = |message: &&Message| matches!(message, Message::Down(down) if down.instance.starts_with("edge/p"));
        said.iter().filter(down).count()
    };
    assert_eq!(downs(), 0);
    ground.control.append(vec![declare("edge")], &[]);
    let ended = loop {
        let said = lines.next_line().await.unwrap().unwrap();
        if !said.starts_with("svid ") {
            break said;
        }
    };
    assert_eq!(ended, "ended PermissionDenied");
    until("control hears that it is none any more", || downs() >= 1).await;
    process.kill().await.unwrap();
    agent.stop(Duration::ZERO).await;
}

/// What software does that is written with the crate `spiffe`: says each SVID as it comes, the leaf in hexadecimal digits.
pub fn crate_main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let source = spiffe::X509Source::new().await.unwrap();
        let tokens = spiffe::JwtSource::new().await.unwrap();
        let token = tokens.fetch_jwt_svid(["orders"]).await.unwrap();
        println!("jwt {} {}", token.spiffe_id(), token.audience().join(" "));
        let mut updates = source.updated();
        let mut last = String::new();
        loop {
            let svid = source.svid().unwrap();
            let said = format!("svid {} {}", svid.spiffe_id(), hex::encode(svid.leaf().as_bytes()));
            if said != std::mem::replace(&mut last, said.clone()) {
                println!("{said}");
            }
            updates.changed().await.unwrap();
        }
    })
}

pub async fn the_crate_of_spiffe_follows_three_rotations_and_a_revocation() {
    let ground = ground().await;
    ground.control.append(vec![registered("edge")], &[]);
    ground.control.svid_seconds.store(4, Ordering::Relaxed);
    let (agent, socket) = start_with_socket(&ground, vec![]).await;
    let mut asks = tokio::process::Command::new(std::env::current_exe().unwrap());
    asks.arg("asks-by-crate").env(ENDPOINT_VARIABLE, format!("unix://{}", socket.display()));
    let mut process = asks.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = tokio::io::BufReader::new(process.stdout.take().unwrap()).lines();
    let id = format!("spiffe://{}/edge", ground.control.trust_domain);
    assert_eq!(lines.next_line().await.unwrap().unwrap(), format!("jwt {id} orders"));
    let mut next = async || {
        let said = lines.next_line().await.unwrap().unwrap();
        hex::decode(said.strip_prefix(&format!("svid {id} ")).unwrap()).unwrap()
    };
    let mut seen = BTreeSet::new();
    for _ in 0..4 {
        assert!(seen.insert(next().await), "an SVID was told twice");
    }
    // From here on another one comes when the last is taken back, and not by time.
    ground.control.svid_seconds.store(3600, Ordering::Relaxed);
    let lasts = |leaf: &[u8]| {
        let (_, leaf) = x509_parser::parse_x509_certificate(leaf).unwrap();
        leaf.validity().time_to_expiration().is_some_and(|left| left.whole_seconds() > 1000)
    };
    let held = loop {
        let leaf = next().await;
        if lasts(&leaf) {
            break leaf;
        }
    };
    ground.control.revoke(&held);
    assert_ne!(next().await, held);
    process.kill().await.unwrap();
    agent.stop(Duration::ZERO).await;
}

pub async fn what_the_agent_started_is_nobody_else_on_the_socket_of_the_host() {
    let ground = ground().await;
    ground.control.append(vec![declare("web"), registered("edge")], &[]);
    let mut spec = workload("web", "");
    spec.run = Some(vec![std::env::current_exe().unwrap().display().to_string(), "asks".into()]);
    let socket = ground.dir.path().join("workload.sock");
    spec.env.insert(ENDPOINT_VARIABLE.into(), format!("unix://{}", socket.display()));
    let (agent, _) = start_with_socket(&ground, vec![spec]).await;
    let mut events = agent.events();
    let said = event(&mut events, |event| match event {
        AgentEvent::Output { line, .. } if line.contains("PermissionDenied") => Some(line.clone()),
        _ => None,
    })
    .await;
    assert!(said.contains("the agent started this process"), "{said}");
    assert!(!ground.control.issued.lock().iter().any(|issued| issued.starts_with("edge/")));
    agent.stop(Duration::ZERO).await;
}

pub async fn one_user_does_not_keep_others_from_the_socket_of_the_host() {
    const CONNECTIONS_PER_USER_MAX: usize = 64;
    let ground = ground().await;
    ground.control.append(vec![registered("edge")], &[]);
    let (agent, socket) = start_with_socket(&ground, vec![]).await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_PER_USER_MAX {
        held.push(tokio::net::UnixStream::connect(&socket).await.unwrap());
    }
    let mut one_more = tokio::net::UnixStream::connect(&socket).await.unwrap();
    assert_eq!(one_more.read(&mut [0]).await.unwrap_or(0), 0, "it is closed");
    drop(held);
    agent.stop(Duration::ZERO).await;
}

/// Tries until there is something.
async fn until_some<T>(what: &str, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = std::time::Instant::now();
    loop {
        if let Some(found) = attempt().await {
            return found;
        }
        assert!(begun.elapsed() < WITHIN, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
