//! This command as a workload: it asks the agent of its host who it is.

use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use tonic::{Code, Request, transport::Endpoint};

use countersign_api::workload::{
    ENDPOINT_VARIABLE, JwtsvidRequest, SECURITY_HEADER, spiffe_workload_api_client::SpiffeWorkloadApiClient,
};
use countersign_core::identity::TrustDomain;

use crate::error::Failure;

/// A JWT-SVID for the control plane of one mesh, fetched whenever it is needed.
pub struct Svid {
    socket: PathBuf,
    audience: Vec<String>,
}

impl Svid {
    /// For the control plane of `trust_domain`. Each value of this type gets tokens of its own, which make one proposal.
    pub fn for_control(trust_domain: &TrustDomain) -> Result<Self, Failure> {
        let help = "run this as a workload of the mesh: `countersign run --service S -- countersign propose …`";
        let given = std::env::var(ENDPOINT_VARIABLE).unwrap_or_default();
        let socket = given
            .strip_prefix("unix://")
            .filter(|path| path.starts_with('/'))
            .ok_or_else(|| Failure::usage(format!("`{ENDPOINT_VARIABLE}` names no socket of an agent")).help(help))?;
        let mut own = [0; 16];
        aws_lc_rs::rand::fill(&mut own).expect("INVARIANT: the system's random source does not fail");
        let audience =
            vec![trust_domain.control().to_string(), format!("urn:countersign:proposal:{}", hex::encode(own))];
        Ok(Self { socket: socket.into(), audience })
    }

    /// A token with at least half of its life before it.
    pub async fn fetch(&self) -> Result<String, Failure> {
        let could_not = || Failure::new("the agent of this host gave no JWT-SVID");
        let socket = self.socket.clone();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connector).await.map_err(|error| {
            could_not().because(&error).help(format!("is an agent listening at `{}`?", self.socket.display()))
        })?;
        let ask = JwtsvidRequest { audience: self.audience.clone(), spiffe_id: String::new() };
        let mut request = Request::new(ask);
        request.metadata_mut().insert(SECURITY_HEADER, "true".parse().expect("INVARIANT: plain text"));
        let answer = SpiffeWorkloadApiClient::new(channel).fetch_jwtsvid(request).await.map_err(|status| {
            let help = match status.code() {
                Code::PermissionDenied => "it must be started by that agent, as an instance of a declared service",
                _ => "ask again once the agent follows the control plane",
            };
            could_not().cause(status.message().to_owned()).help(help)
        })?;
        let svid = answer.into_inner().svids.into_iter().next();
        svid.map(|svid| svid.svid).ok_or_else(|| could_not().cause("its answer is empty"))
    }
}
