//! Keeps identities fresh: the agent's own, and one for each instance on this host. Every renewal makes a new key, asks
//! control to sign it, and checks what came back before anyone uses it. Keys are erased when replaced and never
//! written to a log; the key of an instance's proxy goes to that proxy and nowhere else.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use countersign_api::mesh::{
    IssueJwtSvidRequest, IssueJwtSvidResponse, IssueTokensRequest, IssueTokensResponse, IssueX509SvidRequest,
    RenewAgentRequest, mesh_client::MeshClient,
};
use countersign_core::{
    identity::InstanceId,
    signal::{Serial, Signals},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::{
    AgentEvent,
    backoff::{Backoff, half_life},
    host::Host,
    join::{Issued, IssuedError, SigningRequest},
    link::chain,
    workloads::instance::Instance,
};

/// How long control may take to sign.
const ISSUE_WITHIN: Duration = Duration::from_secs(10);
/// However short an SVID lives, renewals are at least so far apart.
const RENEW_APART: Duration = Duration::from_millis(500);

/// Why there is no new identity this time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IssueError {
    /// A key could not be made.
    #[error("could not make a key")]
    Key(#[from] rcgen::Error),
    /// Control says that this is not to be.
    #[error("control does not issue it: {0}")]
    Refused(String),
    /// Control did not answer, or could not.
    #[error("control did not sign it: {0}")]
    Control(String),
    /// What came is not what was asked for.
    #[error("control signed something that cannot be used")]
    Issued(#[from] IssuedError),
}

/// Keeps the identity of an instance's proxy fresh until dropped. The first one arrives as soon as control can be reached.
pub(crate) async fn keep_instance_fresh(host: Arc<Host>, of: Arc<Instance>, out: watch::Sender<Option<Arc<Issued>>>) {
    let (listener, instance) = (host.clone(), of.clone());
    let told = move |issued: Result<Issued, &IssueError>| match issued {
        Ok(issued) => {
            listener.tell(AgentEvent::IdentityIssued { instance: instance.id.clone() });
            out.send_replace(Some(Arc::new(issued)));
        }
        Err(_) => instance.is_not_identified(),
    };
    keep_fresh(host, of.id.clone(), move || of.artifact(), told).await;
}

/// Keeps an X.509-SVID of `instance` fresh until dropped, and tells each one, or why there is none this time.
pub(crate) async fn keep_fresh(
    host: Arc<Host>,
    instance: InstanceId,
    artifact: impl Fn() -> Bytes,
    told: impl Fn(Result<Issued, &IssueError>),
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    loop {
        match issue(&host, &instance, artifact()).await {
            Ok(issued) => {
                backoff.reset();
                let (renew_in, serial, shown) = (renew_in(&issued), issued.svid.serial(), issued.svid.chain().to_vec());
                tracing::debug!(%instance, svid.id = %issued.svid.id(), svid.not_after = issued.svid.not_after(), ?renew_in, "an identity was issued");
                // Control's bundle beside an identity is as good as one on the stream.
                let _ = host.trust(&issued.bundle.to_message());
                told(Ok(issued));
                tokio::select! {
                    () = tokio::time::sleep(renew_in) => {}
                    // What was issued is worth nothing; whether there is to be another is control's to say.
                    () = revoked(&host, serial) => tracing::warn!(%instance, "an identity was revoked; another is asked for"),
                    () = tainted(&host, &shown) => tracing::info!(%instance, "an identity rests on a root that is tainted; another is asked for"),
                }
            }
            Err(error) => {
                let retry_in = backoff.next_delay();
                tracing::warn!(%instance, error = chain(&error), ?retry_in, "an identity could not be issued");
                told(Err(&error));
                tokio::time::sleep(retry_in).await;
            }
        }
    }
}

/// Returns once the certificate is revoked.
async fn revoked(host: &Host, serial: Option<Serial>) {
    let mut signals = host.signals.subscribe();
    let is_revoked = |signals: &Signals| serial.is_some_and(|serial| signals.is_revoked(&serial));
    // It cannot fail: the sender lies in `host`.
    let _ = signals.wait_for(is_revoked).await;
}

/// Returns once nothing but a tainted root verifies `chain`: what is issued now rests on another.
async fn tainted(host: &Host, chain: &[CertificateDer<'_>]) {
    let mut bundles = host.bundle.subscribe();
    tokio::time::sleep(RENEW_APART).await;
    while !host.tls.bundle().rests_on_tainted(chain, now()) {
        // It cannot fail: the sender lies in `host`.
        let _ = bundles.changed().await;
    }
}

/// Keeps the agent's own identity fresh until dropped.
pub(crate) async fn keep_agent_fresh(host: Arc<Host>) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    let until_renewal = |host: &Host| {
        let svid = host.tls.svid();
        renew_after(svid.not_before(), svid.not_after())
    };
    let is_due = async |host: &Host| {
        let shown = host.tls.svid().chain().to_vec();
        tokio::select! {
            () = tokio::time::sleep(until_renewal(host)) => {}
            () = tainted(host, &shown) => tracing::info!("the agent's identity rests on a root that is tainted"),
        }
    };
    is_due(&host).await;
    loop {
        match renew(&host).await {
            Ok(issued) => {
                backoff.reset();
                tracing::info!(svid.id = %issued.svid.id(), svid.not_after = issued.svid.not_after(), "the agent renewed its identity");
                host.renew(issued);
                is_due(&host).await;
            }
            Err(error) => {
                let retry_in = backoff.next_delay();
                tracing::warn!(error = chain(&error), ?retry_in, "the agent's identity could not be renewed");
                tokio::time::sleep(retry_in).await;
            }
        }
    }
}

async fn issue(host: &Host, instance: &InstanceId, artifact: Bytes) -> Result<Issued, IssueError> {
    let request = SigningRequest::new()?;
    let ask = IssueX509SvidRequest { instance: instance.to_string(), csr_der: request.csr_der.clone(), artifact };
    let mut client = MeshClient::new(channel(host).await);
    let answer = within(client.issue_x509_svid(ask)).await?;
    Ok(request.accept(&answer, |_| host.trust_domain.workload(&instance.service()), now())?)
}

/// Has the access tokens of `instance` signed that are bound to its certificate `leaf_der`.
pub(crate) async fn issue_tokens(
    host: &Host,
    instance: &InstanceId,
    artifact: Bytes,
    leaf_der: Vec<u8>,
) -> Result<IssueTokensResponse, IssueError> {
    let open = host.channel.borrow().clone();
    let channel = open.ok_or_else(|| IssueError::Control("it cannot be reached".into()))?;
    let ask = IssueTokensRequest { instance: instance.to_string(), artifact, leaf_der: leaf_der.into() };
    within(MeshClient::new(channel).issue_tokens(ask)).await
}

/// Has a JWT-SVID of `instance` signed for `audience`. Unlike an X.509-SVID it is not waited for while control is away.
pub(crate) async fn issue_jwt(
    host: &Host,
    instance: &InstanceId,
    audience: Vec<String>,
    artifact: Bytes,
) -> Result<IssueJwtSvidResponse, IssueError> {
    let open = host.channel.borrow().clone();
    let channel = open.ok_or_else(|| IssueError::Control("it cannot be reached".into()))?;
    let ask = IssueJwtSvidRequest { instance: instance.to_string(), audience, artifact };
    within(MeshClient::new(channel).issue_jwt_svid(ask)).await
}

async fn renew(host: &Host) -> Result<Issued, IssueError> {
    let request = SigningRequest::new()?;
    let ask = RenewAgentRequest { csr_der: request.csr_der.clone() };
    let mut client = MeshClient::new(channel(host).await);
    let answer = within(client.renew_agent(ask)).await?;
    Ok(request.accept(&answer, |_| host.trust_domain.agent(&host.name), now())?)
}

/// The open channel; waits while there is none.
async fn channel(host: &Host) -> Channel {
    let mut channels = host.channel.subscribe();
    loop {
        let open = channels.borrow_and_update().clone();
        match open {
            Some(channel) => return channel,
            // It cannot fail: the sender lies in `host`, which is borrowed here.
            None => drop(channels.changed().await),
        }
    }
}

async fn within<T>(answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Result<T, IssueError> {
    match tokio::time::timeout(ISSUE_WITHIN, answer).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) if status.code() == tonic::Code::PermissionDenied => {
            Err(IssueError::Refused(status.message().to_owned()))
        }
        Ok(Err(status)) => Err(IssueError::Control(format!("{} ({})", status.message(), status.code()))),
        Err(_) => Err(IssueError::Control(format!("no answer within {ISSUE_WITHIN:?}"))),
    }
}

/// How long to use a fresh identity before asking for the next: half of what is left of it, so that a certificate
/// dated back for the sake of slow clocks is not renewed early.
fn renew_in(issued: &Issued) -> Duration {
    let left = issued.svid.not_after().saturating_sub(now().as_secs().cast_signed());
    half_life(Duration::from_secs(left.max(0).unsigned_abs())).max(RENEW_APART)
}

/// The same for one that may have been issued long ago.
fn renew_after(not_before: i64, not_after: i64) -> Duration {
    let lifetime = Duration::from_secs((not_after - not_before).max(0).unsigned_abs());
    let age = Duration::from_secs((now().as_secs().cast_signed() - not_before).max(0).unsigned_abs());
    half_life(lifetime).saturating_sub(age).max(RENEW_APART)
}

/// The wall clock, as certificates are dated.
pub(crate) fn now() -> UnixTime {
    UnixTime::since_unix_epoch(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}
