//! The authorization code flow of OpenID Connect (Core 1.0, 3.1), with PKCE (RFC 7636): where a browser is sent, what the code that it
//! brings back is traded for, and whether that is an answer to what was asked.
//!
//! No session is made here. A code is good for whoever asked for it: it is traded with a verifier that only the control plane
//! knows, and what comes back has to say the number that was sent along.

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use http::HeaderValue;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use zeroize::Zeroizing;

use countersign_core::{canonical::Digest, pipeline::Issuer};

use super::{Providers, TokenRefused, VerifiedToken, keys::Endpoints, verify};

/// Longest code that is traded, in bytes.
pub const CODE_BYTES_MAX: usize = 4 * 1024;

/// What a provider is asked.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// What it calls this mesh.
    pub client_id: &'a str,
    /// Where it sends the browser back.
    pub redirect_uri: &'a str,
    /// The claim that is wanted.
    pub groups_claim: &'a str,
    /// What comes back with the browser.
    pub state: &'a str,
    /// What comes back in the token.
    pub nonce: &'a str,
    /// What is shown when the code is traded.
    pub verifier: &'a str,
}

/// Why what a provider said signs nobody in.
#[derive(Debug, thiserror::Error)]
pub enum AnswerRefused {
    /// It gave no token for the code.
    #[error("the provider gave no token for its code: {0}")]
    Code(String),
    /// The token proves nothing.
    #[error("the provider's token is refused: {0}")]
    Token(#[from] TokenRefused),
    /// The token is no answer to this question.
    #[error("the provider's token is refused: {0}")]
    Unasked(&'static str),
}

/// Where a browser is sent with a question.
pub fn url(endpoints: &Endpoints, question: &Question<'_>) -> String {
    let Question { client_id, redirect_uri, groups_claim, state, nonce, verifier } = *question;
    // Some providers tell groups to whom asks for them by this name; others take offence at a scope that they do not know.
    let more = endpoints.scopes.iter().any(|scope| scope == groups_claim).then(|| format!(" {groups_claim}"));
    let challenge = URL_SAFE_NO_PAD.encode(Digest::of(verifier.as_bytes()).0);
    let query = form(&[
        ("response_type", "code"),
        ("scope", &format!("openid{}", more.unwrap_or_default())),
        ("client_id", client_id),
        ("redirect_uri", redirect_uri),
        ("state", state),
        ("nonce", nonce),
        ("code_challenge", &challenge),
        ("code_challenge_method", "S256"),
    ]);
    // "MAY include … query component, which MUST be retained when adding additional query parameters" (RFC 6749, 3.1).
    let joined = if endpoints.authorization.contains('?') { '&' } else { '?' };
    format!("{}{joined}{query}", endpoints.authorization)
}

/// Trades `code` for a token that answers `question`, of the issuer at `issuer`. `secret` is what the provider gave the mesh, if it did.
pub async fn redeem(
    providers: &Providers,
    endpoints: &Endpoints,
    issuer: &str,
    question: &Question<'_>,
    code: &str,
    secret: Option<Zeroizing<String>>,
    now_ms: u64,
) -> Result<VerifiedToken, AnswerRefused> {
    let mut members = vec![
        ("grant_type", "authorization_code"),
        ("code", code),
        ("redirect_uri", question.redirect_uri),
        ("code_verifier", question.verifier),
    ];
    let mut header = None;
    match &secret {
        Some(secret) if !endpoints.secret_in_body => header = Some(basic(question.client_id, secret)),
        Some(secret) => members.extend([("client_id", question.client_id), ("client_secret", secret.as_str())]),
        None => members.push(("client_id", question.client_id)),
    }
    let answer = providers.trade(&endpoints.token, header, form(&members)).await.map_err(AnswerRefused::Code)?;
    let none = || AnswerRefused::Code("its answer has no `id_token`".to_owned());
    let token = answer.get("id_token").and_then(|token| token.as_str()).ok_or_else(none)?;
    let meant = Issuer { url: issuer.to_owned(), audience: question.client_id.to_owned() };
    let token = verify(providers, [&meant], token, now_ms).await?;
    // "If an azp (authorized party) Claim is present, the Client SHOULD verify that its client_id is the Claim Value" (3.1.3.7).
    if token.claim("azp").is_some_and(|azp| azp != question.client_id) {
        return Err(AnswerRefused::Unasked("another client asked for it"));
    }
    // "the Client MUST verify that the nonce Claim Value is equal to the value of the nonce parameter" (2).
    if token.claim("nonce").as_deref() != Some(question.nonce) {
        return Err(AnswerRefused::Unasked("it does not say the number that was sent along"));
    }
    Ok(token)
}

/// "encoded using the application/x-www-form-urlencoded encoding algorithm" before they are joined (RFC 6749, 2.3.1).
fn basic(client_id: &str, secret: &str) -> HeaderValue {
    let joined = Zeroizing::new(format!("{}:{}", encoded(client_id), encoded(secret)));
    let text = Zeroizing::new(format!("Basic {}", STANDARD.encode(joined.as_bytes())));
    let mut value = HeaderValue::from_str(&text).expect("INVARIANT: it is base64");
    value.set_sensitive(true);
    value
}

fn form(members: &[(&str, &str)]) -> String {
    members.iter().map(|(name, value)| format!("{name}={}", encoded(value))).collect::<Vec<_>>().join("&")
}

fn encoded(value: &str) -> String {
    utf8_percent_encode(value, NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browser_is_sent_with_a_challenge_and_never_with_what_it_is_made_of() {
        let endpoints = |authorization: &str, scopes: &[&str]| Endpoints {
            authorization: authorization.into(),
            token: "https://id.example/t".into(),
            names_itself: false,
            secret_in_body: false,
            scopes: scopes.iter().map(|scope| (*scope).to_owned()).collect(),
        };
        // The verifier and the challenge of RFC 7636, appendix B.
        let question = Question {
            client_id: "mesh&x=1",
            redirect_uri: "https://mesh.example/sign-in/with/corp/answer",
            groups_claim: "groups",
            state: "s",
            nonce: "n",
            verifier: "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
        };
        assert_eq!(
            url(&endpoints("https://id.example/a", &["openid", "groups"]), &question),
            "https://id.example/a?response_type=code&scope=openid%20groups&client_id=mesh%26x%3D1&redirect_uri=https%3A%2F%2Fmesh%2E\
             example%2Fsign%2Din%2Fwith%2Fcorp%2Fanswer&state=s&nonce=n&code_challenge=E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw%2DcM\
             &code_challenge_method=S256"
        );
        let of_tenant = url(&endpoints("https://id.example/a?tenant=1", &["openid"]), &question);
        assert!(of_tenant.starts_with("https://id.example/a?tenant=1&response_type=code&scope=openid&"), "{of_tenant}");
        assert!(!of_tenant.contains(question.verifier));
        assert_eq!(basic("a:b", "c d"), "Basic YSUzQWI6YyUyMGQ=");
    }
}
