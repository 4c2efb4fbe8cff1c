//! How a host becomes part of the mesh: a join token that an operator hands out is traded, once, for the agent's own
//! SVID. Of a token only the hash of its secret is kept; the token also names our root, so that the newcomer knows us, and, once
//! there are any, the entries that protected and sealed the mesh, so that it follows no other ledger.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use countersign_api::{
    local::{Invitation, Invite, Problem},
    mesh,
};
use countersign_core::{canonical::Digest, identity::ServiceName, keyring::Pins};

use crate::{
    Plane,
    audit::{Event, Identity},
    authority::SigningRequest,
    hosts::{self, Joined},
    local_api::problem,
    store::{NewInvitation, Spent, StoreError},
};

/// Longest time a join token can be good for.
pub const INVITATION_LIFETIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Services that a host can be bound to at most.
pub const SERVICES_MAX: usize = 1_000;
const SECRET_BYTES: usize = 32;
const PREFIX: &str = "csj1";
/// Longest token we read, in bytes.
const TOKEN_BYTES_MAX: usize = 256;

/// Says what is wrong with what is asked for.
pub fn mistake(plane: &Plane, asked: &Invite) -> Result<(), Problem> {
    let Invite { ttl_seconds, host: _, services } = asked;
    let ttl = Duration::from_secs(*ttl_seconds);
    if ttl.is_zero() || ttl > INVITATION_LIFETIME_MAX {
        let help = "give a time between one second and a day, for example `--ttl 10m`";
        return Err(problem(422, "a join token is good for a day at most", None, Some(help)));
    }
    if services.as_ref().is_some_and(|services| services.is_empty() || services.len() > SERVICES_MAX) {
        let help =
            "name the services that the host runs, or leave `--services` out: then it may run every declared one";
        return Err(problem(422, format!("a host is bound to 1 to {SERVICES_MAX} services"), None, Some(help)));
    }
    if plane.authority().is_none() { Err(no_mesh()) } else { Ok(()) }
}

fn no_mesh() -> Problem {
    let help = "apply a mesh directory first: `countersign apply DIR`";
    problem(409, "there is no mesh yet to join", None, Some(help))
}

/// Makes a join token.
pub async fn invite(plane: &Plane, asked: Invite) -> Result<Invitation, Problem> {
    mistake(plane, &asked)?;
    let Invite { ttl_seconds, host, services } = asked;
    let authority = plane.authority().ok_or_else(no_mesh)?;
    let mut secret = zeroize::Zeroizing::new([0; SECRET_BYTES]);
    aws_lc_rs::rand::fill(&mut *secret).expect("INVARIANT: the system's random source does not fail");
    let hash = Digest::of(&*secret);
    let now_ms = plane.clock.now_ms();
    let expires_at_ms = now_ms + ttl_seconds * 1000;
    let kept = plane
        .storage
        .run("put_invitation", move |store| {
            store.put_invitation(&hash, &NewInvitation { expires_at_ms, host, services }, now_ms)
        })
        .await
        .map_err(|error| crate::local_api::store_problem(&error))?;
    if !kept {
        let help = "wait until some have expired";
        return Err(problem(429, "too many join tokens are open", None, Some(help)));
    }
    let mut token =
        format!("{PREFIX}.{}.{}", URL_SAFE_NO_PAD.encode(*secret), URL_SAFE_NO_PAD.encode(authority.root_sha256().0));
    let Pins { anchor, seal, recovery } = plane.ledger.head().keyring.pins();
    for pin in [anchor, seal, recovery].into_iter().flatten() {
        token = format!("{token}.{}", URL_SAFE_NO_PAD.encode(pin.0));
    }
    Ok(Invitation { token, expires_at_ms, control: plane.advertised.url.clone(), note: plane.advertised.note.clone() })
}

/// The hash of the secret of a well-formed token for one of our roots, and for our anchor, seal and recovery if it names them.
fn hash_of(token: &str, roots: &[Digest], pins: Pins) -> Option<Digest> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let parts: Vec<_> = token.split('.').collect();
    let [PREFIX, secret, claimed_root, ref claimed_pins @ ..] = parts[..] else { return None };
    let own = [pins.anchor, pins.seal, pins.recovery];
    let is_own = |(claimed, own): (&&str, &Option<Digest>)| {
        own.is_some_and(|own| URL_SAFE_NO_PAD.decode(claimed).is_ok_and(|claimed| claimed == own.0))
    };
    if claimed_pins.len() > own.len() || !claimed_pins.iter().zip(&own).all(is_own) {
        return None;
    }
    let secret = zeroize::Zeroizing::new(URL_SAFE_NO_PAD.decode(secret).ok()?);
    let claimed_root = URL_SAFE_NO_PAD.decode(claimed_root).ok()?;
    let is_ours = roots.iter().any(|root| claimed_root == root.0);
    (secret.len() == SECRET_BYTES && is_ours).then(|| Digest::of(&secret))
}

/// The service that answers a newcomer.
#[derive(Clone)]
pub struct Enrolment(pub Arc<Plane>);

#[tonic::async_trait]
impl mesh::enrolment_server::Enrolment for Enrolment {
    async fn join(
        &self,
        request: tonic::Request<mesh::JoinRequest>,
    ) -> Result<tonic::Response<mesh::JoinResponse>, tonic::Status> {
        let asked = request.into_inner();
        let answer = join(&self.0, asked).await;
        if answer.is_err() {
            self.0.metrics.refused("join");
        }
        answer.map(tonic::Response::new)
    }
}

async fn join(plane: &Plane, asked: mesh::JoinRequest) -> Result<mesh::JoinResponse, tonic::Status> {
    let authority = plane.authority().ok_or_else(|| tonic::Status::unavailable("there is no mesh yet"))?;
    // Everything that can be wrong with the request is found before the token is spent.
    let host = ServiceName::parse(&asked.host).map_err(|e| tonic::Status::invalid_argument(e.to_string()))?;
    let request = SigningRequest::parse(&asked.csr_der).map_err(|e| tonic::Status::invalid_argument(e.to_string()))?;
    let unknown = || tonic::Status::unauthenticated("the join token is not one of this mesh");
    // The secret has 256 random bits and is looked up by its hash: how long the lookup takes tells nothing of it.
    let hash = hash_of(&asked.token, &authority.known_by(), plane.ledger.head().keyring.pins()).ok_or_else(unknown)?;
    let now_ms = plane.clock.now_ms();
    let for_host = host.clone();
    let spent = plane
        .storage
        .run("spend_invitation", move |store| store.spend_invitation(&hash, &for_host, now_ms))
        .await
        .map_err(unavailable)?;
    if let Spent::Admitted(_) = spent {
        let joined = Joined { host: host.clone(), key: request.key_sha256() };
        hosts::came_by(plane, &hash, &joined).await.map_err(unavailable)?;
    }
    match spent {
        // Before the SVID: no agent of this host is ever let do more than its invitation says.
        Spent::Admitted(services) => plane.publisher.registry(|registry| registry.entitle(&host, services)),
        Spent::Unknown => return Err(unknown()),
        Spent::Used => {
            let evicted = hosts::shown_twice(plane, &hash, request.key_sha256()).await;
            let evicted = evicted.map_err(|problem| tonic::Status::unavailable(problem.title))?;
            tracing::error!(
                %host,
                evicted = evicted.as_ref().map(tracing::field::display),
                "a join token was shown a second time: whoever used it first may not be who was invited"
            );
            let told = Event::JoinTokenReused { host: host.to_string(), evicted: evicted.map(|host| host.to_string()) };
            plane.tell(told);
            return Err(tonic::Status::unauthenticated(
                "the join token was used before, and is good for one join: somebody else may have it. Tell whoever invited this host; \
                 what was issued for it is revoked if it was another's",
            ));
        }
        Spent::Expired => return Err(tonic::Status::unauthenticated("the join token has expired")),
        Spent::OtherHost => return Err(tonic::Status::permission_denied("the join token is good for another host")),
    }
    let issued = authority.issue_agent(&host, &request).await.map_err(|e| {
        tracing::error!(error = %e, "an agent's SVID could not be signed");
        tonic::Status::unavailable("the SVID could not be signed")
    })?;
    plane.metrics.issued("agent");
    tracing::info!(host = %host, "host joined");
    let (name, expires_at_ms) = (host.to_string(), issued.expires_at_ms);
    plane.tell(Event::Issued { what: Identity::Agent, name: name.clone(), host: name, expires_at_ms });
    Ok(mesh::JoinResponse { svid: Some(authority.to_message(issued)) })
}

fn unavailable(error: StoreError) -> tonic::Status {
    tonic::Status::unavailable(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_with_as_many_pins_as_there_were_when_it_was_made_if_they_are_ours() {
        let part = |of: &[u8]| URL_SAFE_NO_PAD.encode(Digest::of(of).0);
        let (anchor, seal) = (Digest::of(b"anchor"), Digest::of(b"seal"));
        let roots = [Digest::of(b"root"), Digest::of(b"old root")];
        let secret = URL_SAFE_NO_PAD.encode([7; SECRET_BYTES]);
        let pins = |anchor, seal| Pins { anchor, seal, recovery: None };
        let recovered = Pins { recovery: Some(Digest::of(b"recovery")), ..pins(Some(anchor), Some(seal)) };
        let sealed = pins(Some(anchor), Some(seal));
        for (case, parts, own, good) in [
            ("unprotected", vec![part(b"root")], Pins::default(), true),
            ("made before the anchor", vec![part(b"root")], sealed, true),
            ("made before the seal", vec![part(b"root"), part(b"anchor")], sealed, true),
            ("sealed", vec![part(b"root"), part(b"anchor"), part(b"seal")], sealed, true),
            ("another anchor", vec![part(b"root"), part(b"x"), part(b"seal")], sealed, false),
            ("another seal", vec![part(b"root"), part(b"anchor"), part(b"x")], sealed, false),
            ("a pin that is not there", vec![part(b"root"), part(b"anchor")], Pins::default(), false),
            (
                "a seal before there is one",
                vec![part(b"root"), part(b"anchor"), part(b"seal")],
                pins(Some(anchor), None),
                false,
            ),
            ("a part too many", vec![part(b"root"), part(b"anchor"), part(b"seal"), part(b"seal")], sealed, false),
            ("recovered", vec![part(b"root"), part(b"anchor"), part(b"seal"), part(b"recovery")], recovered, true),
            ("made before the recovery", vec![part(b"root"), part(b"anchor"), part(b"seal")], recovered, true),
            ("another recovery", vec![part(b"root"), part(b"anchor"), part(b"seal"), part(b"x")], recovered, false),
            ("made before another root signed", vec![part(b"old root"), part(b"anchor")], sealed, true),
            ("another root", vec![part(b"x"), part(b"anchor"), part(b"seal")], sealed, false),
        ] {
            let token = format!("csj1.{secret}.{}", parts.join("."));
            assert_eq!(hash_of(&token, &roots, own).is_some(), good, "{case}");
        }
    }
}
