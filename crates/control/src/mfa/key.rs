//! Passkeys and security keys (WebAuthn Level 2 and 3): how one is enrolled, how its owner signs in, and how the count of its
//! signatures is kept. What an authenticator says of a new key is verified by `webauthn-rs`; what a key signs, by `core`.
//!
//! The user is always verified, never only present. Where the mesh names the authenticators that may be enrolled, a new key shows by
//! its attestation that it is in one of them.

use std::collections::BTreeMap;

use aws_lc_rs::hmac;
use serde::{Deserialize, Serialize};
use serde_json::json;
use webauthn_rs::prelude::{
    AttestationCaList, AttestationCaListBuilder, AttestationMetadata, AttestedPasskeyRegistration, COSEKey,
    COSEKeyType, Credential, PasskeyRegistration, RegisterPublicKeyCredential, Uuid, WebauthnError,
};

use countersign_api::local::{ConfirmKey, EnrolKey, Enrolled, KeyChallenge, KeyEnrolment, Problem, SignedChallenge};
use countersign_core::{
    assurance::{
        FactorKind, Proof,
        authenticators::{Aaguid, Authenticators},
        challenge::{Acting, SignIn},
        webauthn::{self, AssertionRefused, PresentedAssertion, PublicKey, RelyingParty, VerifiedAssertion},
    },
    canonical::Digest,
    gate::act::Act,
    identity::{FactorId, OperatorName},
    operator::{EnrolledFactor, SigningKey},
    state::MeshState,
};

use super::{EnrolsFrom, NewFactor, Way, bring_in, kept_key, seconds, spend, way};
use crate::{
    Plane,
    ceremony::{self, CEREMONY_LIFETIME_MS, none_waits, put, take},
    local_api::{problem, store_problem},
    site::Site,
};

const ENROLMENT_KIND: &str = "key-enrolment";
/// The name of the key that makes what operators are called towards authenticators.
const NAMES_KEY: &str = "mfa/names-key";
const SIGN_IN_KIND: &str = "sign-in";
/// Longest answer of an authenticator that is read, in bytes: with an attestation.
const ANSWER_BYTES_MAX: usize = 32 * 1024;
/// Models that a refusal counts up.
const MODELS_SHOWN: usize = 5;

/// An enrolment that waits for the authenticator.
#[derive(Serialize, Deserialize)]
struct Enrolling {
    operator: OperatorName,
    way: Way,
    #[serde(flatten)]
    registration: Registration,
}

/// What is asked of the authenticator, by the setting that held when it was asked.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Registration {
    /// Any will do. It is kept under the name that it had before there were others.
    #[serde(rename = "registration")]
    Any(PasskeyRegistration),
    /// One of a list, which it has to prove.
    Attested {
        /// The digest of the list.
        list: Digest,
        registration: AttestedPasskeyRegistration,
    },
}

/// A sign-in that waits for the authenticator.
#[derive(Serialize, Deserialize)]
struct SigningIn {
    /// Who was named; a passkey says by itself whose it is.
    operator: Option<OperatorName>,
}

/// Who signed in, and with what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedIn {
    /// Who.
    pub operator: OperatorName,
    /// With which factor.
    pub factor: FactorId,
    /// Its kind.
    pub kind: FactorKind,
}

/// Begins the enrolment of a key.
pub async fn begin(
    plane: &Plane,
    site: &Site,
    asked: EnrolKey,
    signed_in: Option<&OperatorName>,
) -> Result<KeyEnrolment, Problem> {
    let EnrolKey { enrol, attachment } = asked;
    let operator = enrol.operator;
    let from = EnrolsFrom::Site(signed_in);
    let way = way(plane, &operator, enrol.invitation.as_ref(), &enrol.shown, from).await?;
    let head = plane.ledger.head();
    let state = head.follower.state();
    // A key that somebody has enrolled is not enrolled again.
    let known: Vec<_> = keys_of(state, &operator).filter_map(|(id, _)| id.credential()).collect();
    let user = user_handle(plane, &operator).await?;
    let name = operator.as_str();
    let begun = match &state.authenticators {
        None => site
            .webauthn
            .start_passkey_registration(user, name, name, Some(known))
            .map(|(options, registration)| (options, Registration::Any(registration))),
        Some(only) => site
            .webauthn
            .start_attested_passkey_registration(user, name, name, Some(known), vouchers(only)?, None)
            .map(|(options, registration)| (options, Registration::Attested { list: only.digest(), registration })),
    };
    let (options, registration) = begun.map_err(|error| refused_by_library(&error, None))?;
    let mut options = serde_json::to_value(options).map_err(|error| unusable(&error))?;
    if let Some(selection) = options.pointer_mut("/publicKey/authenticatorSelection") {
        // A passkey that the browser finds by itself where there is one; a security key without that is as good.
        selection["residentKey"] = json!("preferred");
        if let Some(attachment @ ("platform" | "cross-platform")) = attachment.as_deref() {
            selection["authenticatorAttachment"] = json!(attachment);
        }
    }
    // As of any key, and of nothing that it need not know: an authenticator that cannot protect its credentials would make none,
    // and no browser would say why. Each use of the key is held to a verified user in any case.
    if let Some(asked) = options.pointer_mut("/publicKey/extensions") {
        *asked = json!({
            "credentialProtectionPolicy": "userVerificationRequired",
            "enforceCredentialProtectionPolicy": false,
            "credProps": true,
        });
    }
    let id =
        put(plane, ENROLMENT_KIND, super::ENROLMENT_LIFETIME_MS, &Enrolling { operator, way, registration }).await?;
    Ok(KeyEnrolment { id: id.to_string(), options: options["publicKey"].take() })
}

/// Ends an enrolment: what the authenticator made becomes a factor, or a change that waits to be signed.
pub async fn finish(plane: &Plane, site: &Site, answer: ConfirmKey) -> Result<Enrolled, Problem> {
    let Enrolling { operator, way, registration } =
        take(plane, ENROLMENT_KIND, &answer.id).await?.ok_or_else(|| none_waits("enrolment"))?;
    let attachment = answer.credential.get("authenticatorAttachment").and_then(|value| value.as_str());
    let kind = if attachment == Some("platform") { FactorKind::Platform } else { FactorKind::Roaming };
    let presented: RegisterPublicKeyCredential = serde_json::from_value(answer.credential)
        .map_err(|error| problem(400, "the authenticator's answer is none", Some(error.to_string()), None))?;
    if presented.response.attestation_object.len() > ANSWER_BYTES_MAX {
        return Err(problem(413, "the authenticator's answer is too long", None, None));
    }
    let head = plane.ledger.head();
    let state = head.follower.state();
    let list = match &registration {
        Registration::Any(_) => None,
        Registration::Attested { list, .. } => Some(*list),
    };
    held_to(list, state)?;
    let verified = match &registration {
        Registration::Any(registration) => {
            site.webauthn.finish_passkey_registration(&presented, registration).map(Credential::from)
        }
        Registration::Attested { registration, .. } => {
            site.webauthn.finish_attested_passkey_registration(&presented, registration).map(Credential::from)
        }
    };
    let credential = verified.map_err(|error| refused_by_library(&error, state.authenticators.as_ref()))?;
    if !credential.user_verified {
        return Err(refused(&AssertionRefused::NotVerified));
    }
    let unusable_key = |what: String| {
        let help = "use another authenticator: ES256, EdDSA and RS256 are taken";
        problem(422, "the authenticator's key cannot be used", Some(what), Some(help))
    };
    let key = PublicKey::parse(&cose(&credential.cred)?).map_err(|error| unusable_key(error.to_string()))?;
    let id = FactorId::of_credential(credential.cred_id.as_ref()).map_err(|error| unusable_key(error.to_string()))?;
    if owner_of(state, &id).is_some() {
        return Err(problem(409, "this key is enrolled already", None, Some("use another authenticator")));
    }
    spend(plane, &operator, &way).await?;
    let signing = SigningKey {
        key,
        backup_eligible: credential.backup_eligible,
        relying_party: site.relying_party.clone(),
        model: list.and(proven_model(&credential)),
    };
    let factor = match kind {
        FactorKind::Platform => EnrolledFactor::Platform(signing),
        _ => EnrolledFactor::Roaming(signing),
    };
    ceremony::count(plane, &operator, &id, credential.counter).await?;
    let now_ms = plane.clock.now_ms();
    let proof =
        Proof { kind, at_seconds: seconds(now_ms), user_verified: true, device_bound: !credential.backup_eligible };
    bring_in(plane, operator, NewFactor { id, factor, proof, list }, &way, now_ms).await
}

/// What an operator signs to sign in. Who is not named is found by the passkey; who is named and does not exist is answered like
/// everybody else.
pub async fn sign_in_challenge(
    plane: &Plane,
    site: &Site,
    operator: Option<OperatorName>,
) -> Result<KeyChallenge, Problem> {
    let head = plane.ledger.head();
    let Some(anchor) = head.keyring.anchor() else {
        let help =
            "the control plane prints an enrolment link when it starts; `countersign operator link` prints another";
        return Err(problem(409, "nobody can sign in: the mesh is unprotected", None, Some(help)));
    };
    let mut ids = Vec::new();
    if let Some(operator) = &operator {
        ids.extend(keys_of(head.follower.state(), operator).map(|(id, _)| id.as_str().to_owned()));
        if ids.is_empty() {
            // Always the same for one name, and not to be told from a key that is there.
            ids.push(decoy(plane, operator).await?);
        }
    }
    let nonce = put(plane, SIGN_IN_KIND, CEREMONY_LIFETIME_MS, &SigningIn { operator }).await?;
    let challenge = SignIn { anchor, nonce }.encode();
    Ok(KeyChallenge { nonce, options: request_options(site, &challenge, &ids) })
}

/// Verifies the answer to it, and uses it up.
pub async fn sign_in(plane: &Plane, answer: &SignedChallenge) -> Result<SignedIn, Problem> {
    let waiting: Option<SigningIn> = take(plane, SIGN_IN_KIND, &answer.nonce.to_string()).await?;
    let waiting = waiting.ok_or_else(|| none_waits("sign-in"))?;
    let head = plane.ledger.head();
    let state = head.follower.state();
    let anchor = head.keyring.anchor().ok_or_else(|| none_waits("sign-in"))?;
    // A stranger is not told whether the key is unknown or what it signed is wrong.
    let nobody = || problem(403, "the key is not one of an operator, or did not sign this", None, None);
    let (operator, factor) = owner_of(state, &answer.credential).ok_or_else(nobody)?;
    if waiting.operator.as_ref().is_some_and(|named| named != operator) {
        return Err(nobody());
    }
    let handle = user_handle(plane, operator).await?;
    if answer.user_handle.as_ref().is_some_and(|said| said.0 != handle.as_bytes()) {
        return Err(nobody());
    }
    let sign_in = SignIn { anchor, nonce: answer.nonce };
    let verified = presented(factor, answer, |presented, credential, relying_party| {
        webauthn::verify_sign_in(presented, credential, relying_party, &sign_in)
    })?;
    ceremony::count(plane, operator, &answer.credential, verified.sign_count()).await?;
    Ok(SignedIn { operator: operator.clone(), factor: answer.credential.clone(), kind: factor.kind() })
}

/// Verifies what a key of `operator` signed for an act. Its challenge was taken back before.
pub async fn prove_act(
    plane: &Plane,
    operator: &OperatorName,
    act: Act,
    answer: &SignedChallenge,
) -> Result<Proof, Problem> {
    let head = plane.ledger.head();
    let anchor = head.keyring.anchor().ok_or_else(|| none_waits("challenge"))?;
    let (owner, factor) =
        owner_of(head.follower.state(), &answer.credential)
            .filter(|(owner, _)| *owner == operator)
            .ok_or_else(|| problem(403, "the key is not one of yours", None, Some("use a key of your own")))?;
    let acting = Acting { anchor, act, nonce: answer.nonce };
    let verified = presented(factor, answer, |presented, credential, relying_party| {
        webauthn::verify_act(presented, credential, relying_party, &acting)
    })?;
    ceremony::count(plane, owner, &answer.credential, verified.sign_count()).await?;
    Ok(Proof::of_assertion(factor.kind(), &verified, seconds(plane.clock.now_ms())))
}

/// Puts what a key signed to `verify`, with what is known of the key.
fn presented(
    factor: &EnrolledFactor,
    answer: &SignedChallenge,
    verify: impl FnOnce(
        &PresentedAssertion<'_>,
        &webauthn::Credential<'_>,
        &RelyingParty,
    ) -> Result<VerifiedAssertion, AssertionRefused>,
) -> Result<VerifiedAssertion, Problem> {
    let signing = factor.signing_key().ok_or_else(|| problem(403, "a code signs nothing", None, None))?;
    let id = answer.credential.credential().unwrap_or_default();
    let presented = PresentedAssertion {
        credential_id: &id,
        authenticator_data: &answer.authenticator_data.0,
        client_data_json: &answer.client_data_json.0,
        signature: &answer.signature.0,
    };
    let (key, backup_eligible) = (&signing.key, signing.backup_eligible);
    let credential = webauthn::Credential { id: &id, key, backup_eligible, sign_count: None };
    verify(&presented, &credential, &signing.relying_party).map_err(|why| {
        tracing::info!(credential = answer.credential.as_str(), %why, "what a key signed was refused");
        refused(&why)
    })
}

/// What a browser passes to `navigator.credentials.get`.
pub fn request_options(site: &Site, challenge: &str, credentials: &[String]) -> serde_json::Value {
    let allowed: Vec<_> = credentials.iter().map(|id| json!({ "type": "public-key", "id": id })).collect();
    json!({
        "challenge": challenge,
        "rpId": site.relying_party.id,
        "timeout": CEREMONY_LIFETIME_MS,
        "userVerification": "required",
        "allowCredentials": allowed,
    })
}

/// What a refused assertion says to the operator.
pub fn refused(why: &AssertionRefused) -> Problem {
    let help = match why {
        AssertionRefused::Cloned { .. } => "remove this key, and enrol another: two devices may hold it",
        AssertionRefused::NotVerified => "the authenticator must ask for a PIN or a fingerprint",
        AssertionRefused::Origin(_) => "open the dashboard under the address that the key was enrolled at",
        _ => "sign again; nothing was changed",
    };
    problem(403, "what the key signed is refused", Some(why.to_string()), Some(help))
}

/// Why the authenticator's word was not taken; `only`: those that may be enrolled.
fn refused_by_library(error: &WebauthnError, only: Option<&Authenticators>) -> Problem {
    let (title, detail) = match (error, only) {
        (WebauthnError::AttestationNotVerifiable | WebauthnError::AttestationFormatMissingAaguid, Some(_)) => (
            "the authenticator did not prove which model it is",
            "it gave no attestation with a certificate and a model, or the browser kept it back".to_owned(),
        ),
        (WebauthnError::AttestationUntrustedAaguid, Some(_)) => {
            ("an authenticator of this model may not be enrolled", error.to_string())
        }
        (WebauthnError::AttestationChainNotTrusted(why), Some(_)) => (
            "nobody whom the mesh believes vouches for this authenticator",
            format!("its certificates do not lead to a root of `[factors] attestation_roots`: {why:?}"),
        ),
        (WebauthnError::CredentialMayNotBeHardwareBound, Some(_)) => {
            ("a passkey that may be copied to other devices may not be enrolled", error.to_string())
        }
        _ => ("what the authenticator said of the new key is refused", error.to_string()),
    };
    let help = match only {
        None => "begin again".to_owned(),
        Some(only) => {
            let models: Vec<String> = only.models.iter().take(MODELS_SHOWN).map(Aaguid::to_string).collect();
            let more = if only.models.len() > MODELS_SHOWN { ", and others" } else { "" };
            format!(
                "begin again with one that may be enrolled, and let the browser show its make and model: {}{more}; \
                 `[factors]` in mesh.toml names them",
                models.join(", ")
            )
        }
    };
    problem(403, title, Some(detail), Some(&help))
}

/// Refuses an enrolment that was begun under another list of authenticators, `list`, than the one in force.
pub(super) fn held_to(list: Option<Digest>, state: &MeshState) -> Result<(), Problem> {
    let in_force = state.authenticators.as_ref().map(Authenticators::digest);
    // Where any may be enrolled again, one that had to prove itself may.
    if in_force.is_none() || in_force == list {
        return Ok(());
    }
    let title = "which authenticators may be enrolled has changed since this began";
    Err(problem(409, title, None, Some("begin again: the authenticator is asked to prove what it is")))
}

/// Who vouches for which models, as the library takes it: each root for each model.
fn vouchers(only: &Authenticators) -> Result<AttestationCaList, Problem> {
    let mut vouchers = AttestationCaListBuilder::new();
    for root in &only.roots {
        for model in &only.models {
            let inserted = vouchers.insert_device_der(
                root.der(),
                Uuid::from_bytes(model.bytes()),
                model.to_string(),
                BTreeMap::new(),
            );
            inserted.map_err(|error| {
                let help = "give another certificate of its maker, as `[factors] attestation_roots` in mesh.toml";
                let title = format!("nothing can be enrolled: the root certificate {root} cannot be used");
                problem(409, title, Some(error.to_string()), Some(help))
            })?;
        }
    }
    Ok(vouchers.build())
}

/// The model that an attestation names.
fn proven_model(credential: &Credential) -> Option<Aaguid> {
    match &credential.attestation.metadata {
        AttestationMetadata::Packed { aaguid } | AttestationMetadata::Tpm { aaguid, .. } => {
            Some(Aaguid::of_bytes(*aaguid.as_bytes()))
        }
        _ => None,
    }
}

fn unusable(error: &serde_json::Error) -> Problem {
    problem(500, "a challenge could not be written", Some(error.to_string()), None)
}

/// The keys of an operator.
pub fn keys_of<'a>(
    state: &'a MeshState,
    operator: &OperatorName,
) -> impl Iterator<Item = (&'a FactorId, &'a SigningKey)> + use<'a> {
    let factors = state.operators.get(operator).into_iter().flat_map(|operator| &operator.factors);
    factors.filter_map(|(id, factor)| Some((id, factor.signing_key()?)))
}

/// Whose factor it is.
fn owner_of<'a>(state: &'a MeshState, id: &FactorId) -> Option<(&'a OperatorName, &'a EnrolledFactor)> {
    state.operators.iter().find_map(|(name, operator)| Some((name, operator.factors.get(id)?)))
}

/// What authenticators know an operator by: it says nothing to anybody else, and is the same for all of their keys.
async fn user_handle(plane: &Plane, operator: &OperatorName) -> Result<Uuid, Problem> {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&named_tag(plane, "user-handle", operator).await?.as_ref()[..16]);
    Ok(Uuid::from_bytes(bytes))
}

/// The id of a key that nobody has.
async fn decoy(plane: &Plane, operator: &OperatorName) -> Result<String, Problem> {
    let id = FactorId::of_credential(named_tag(plane, "decoy", operator).await?.as_ref());
    Ok(id.map(|id| id.as_str().to_owned()).unwrap_or_default())
}

async fn named_tag(plane: &Plane, what: &str, operator: &OperatorName) -> Result<hmac::Tag, Problem> {
    let key = kept_key(plane, NAMES_KEY).await.map_err(|error| store_problem(&error))?;
    Ok(hmac::sign(&key, format!("{what}/{operator}").as_bytes()))
}

/// The COSE form of a key (RFC 9052, section 7; RFC 9053; RFC 8230), in the canonical encoding of CTAP2.
fn cose(key: &COSEKey) -> Result<Vec<u8>, Problem> {
    const KTY: u8 = 0x01;
    const ALG: u8 = 0x03;
    let bytes = |label: u8, bytes: &[u8]| {
        let length = bytes.len();
        let head = match length {
            0..24 => vec![label, 0x40 | length as u8],
            24..256 => vec![label, 0x58, length as u8],
            _ => vec![label, 0x59, (length >> 8) as u8, length as u8],
        };
        [head, bytes.to_vec()].concat()
    };
    Ok(match &key.key {
        COSEKeyType::EC_EC2(point) => {
            let head = vec![0xa5, KTY, 0x02, ALG, 0x26, 0x20, 0x01];
            [head, bytes(0x21, &point.x), bytes(0x22, &point.y)].concat()
        }
        COSEKeyType::EC_OKP(key) => [vec![0xa4, KTY, 0x01, ALG, 0x27, 0x20, 0x06], bytes(0x21, &key.x)].concat(),
        COSEKeyType::RSA(key) => {
            [vec![0xa4, KTY, 0x03, ALG, 0x39, 0x01, 0x00], bytes(0x20, &key.n), bytes(0x21, &key.e)].concat()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use webauthn_rs::prelude::COSEAlgorithm;

    #[test]
    fn a_new_key_is_written_as_its_standard_says() {
        let rsa: COSEKey = serde_json::from_value(json!({
            "type_": "RS256",
            "key": { "RSA": { "n": base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, [0xff; 256]), "e": [1, 0, 1] } },
        }))
        .unwrap();
        assert_eq!(rsa.type_, COSEAlgorithm::RS256);
        let written = PublicKey::parse(&cose(&rsa).unwrap()).unwrap();
        assert_eq!(written.algorithm(), "RS256");
    }
}
