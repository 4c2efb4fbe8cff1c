//! How an operator who is signed in signs a change: the page asks for a challenge, the authenticator signs it, and what it signed
//! goes with the change into the ledger. The session says who asks, and nothing more.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use serde::{Deserialize, Serialize};

use countersign_api::local::{
    AnsweredProposal, Code, KeyChallenge, OperatorInvitation, Proposal, ProposalDetail, Shown, SignedChallenge,
};
use countersign_core::{
    assurance::challenge::{Challenge, Purpose},
    change::Revision,
    countersignature::Countersignature,
    identity::OperatorName,
};

use super::{session::Session, sign_in::no_site};
use crate::{
    Plane,
    local_api::{Refusal, problem},
    mfa::key,
    proposals::{self, Answering},
};

type Answered<T> = Result<Json<T>, Refusal>;

/// What became of an answer to a change.
#[derive(Default, Serialize)]
pub struct Answer {
    /// The revision that it made, once nothing is missing.
    revision: Option<Revision>,
    /// What operators whom it invites are to be handed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    invitations: Vec<OperatorInvitation>,
}

/// Hands out what a key is to sign for a change.
pub async fn challenge(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Path(id): Path<String>,
) -> Answered<KeyChallenge> {
    let site = plane.site.as_ref().ok_or_else(no_site)?;
    let ProposalDetail { proposal, .. } = proposals::show(&plane, &id).await?;
    let operator = session.as_operator()?;
    let shown = Shown { operator: Some(operator.clone()), ..Shown::default() };
    let ceremony = proposals::begin_ceremony(&plane, &id, &shown).await?;
    let head = plane.ledger.head();
    let anchor = head.keyring.anchor().ok_or_else(|| problem(409, "the mesh is unprotected", None, None))?;
    let challenge = Challenge {
        anchor,
        purpose: ceremony.purpose,
        base: proposal.base,
        root: proposal.root,
        change_set: proposal.digest,
        nonce: ceremony.nonce,
    };
    let keys = key::keys_of(head.follower.state(), operator);
    let ids: Vec<_> = keys.map(|(id, _)| id.as_str().to_owned()).collect();
    Ok(Json(KeyChallenge { nonce: ceremony.nonce, options: key::request_options(site, &challenge.encode(), &ids) }))
}

/// Takes what it signed: the author's applies the change, another operator's countersigns it.
pub async fn sign(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Path(id): Path<String>,
    Json(signed): Json<SignedChallenge>,
) -> Answered<Answer> {
    let ProposalDetail { proposal, .. } = proposals::show(&plane, &id).await?;
    let operator = session.as_operator()?;
    let own = proposal.author == *operator;
    let countersignature = Countersignature {
        operator: operator.clone(),
        credential: signed.credential,
        purpose: if own { Purpose::StepUp } else { Purpose::Countersign },
        base: proposal.base,
        root: proposal.root,
        nonce: signed.nonce,
        authenticator_data: signed.authenticator_data,
        client_data_json: signed.client_data_json,
        signature: signed.signature,
    };
    let countersignature = Some(Box::new(countersignature));
    answer(&plane, &proposal, Shown { countersignature, ..as_operator(operator) }).await
}

/// A code of an authenticator app.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WithCode {
    pub(super) code: Code,
}

/// Takes a code, where the gate takes one.
pub async fn code(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Path(id): Path<String>,
    Json(WithCode { code }): Json<WithCode>,
) -> Answered<Answer> {
    let ProposalDetail { proposal, .. } = proposals::show(&plane, &id).await?;
    answer(&plane, &proposal, Shown { otp: Some(code), ..as_operator(session.as_operator()?) }).await
}

async fn answer(plane: &Plane, proposal: &Proposal, shown: Shown) -> Answered<Answer> {
    if shown.operator.as_ref() != proposal.author.operator() {
        let AnsweredProposal { proposal, invitations } = proposals::countersign(plane, &proposal.id, shown).await?;
        return Ok(Json(Answer { revision: proposal.state.revision(), invitations }));
    }
    match proposals::apply_pending(plane, &proposal.id, shown).await {
        Ok(applied) => Ok(Json(Answer { revision: Some(applied.revision), invitations: applied.invitations })),
        // The author has shown enough; now it waits for others.
        Err(refused) if refused.refusal.as_ref().is_some_and(|refusal| refusal.waits_for_others()) => {
            Ok(Json(Answer::default()))
        }
        Err(refused) => Err(refused.into()),
    }
}

fn as_operator(operator: &OperatorName) -> Shown {
    Shown { operator: Some(operator.clone()), ..Shown::default() }
}

/// Says no to somebody else's change.
pub async fn reject(State(plane): State<Arc<Plane>>, session: Session, Path(id): Path<String>) -> Answered<Answer> {
    proposals::reject(&plane, &id, Answering::signed_in(session.who)).await?;
    Ok(Json(Answer::default()))
}

/// Takes one's own back.
pub async fn withdraw(State(plane): State<Arc<Plane>>, session: Session, Path(id): Path<String>) -> Answered<Answer> {
    proposals::withdraw(&plane, &id, Answering::signed_in(session.who)).await?;
    Ok(Json(Answer::default()))
}
