//! Pipelines as the ledger knows them: whose tokens are believed, and which of them may propose changes of the mesh.
//!
//! A pipeline is matched by claims that its provider never gives to anybody else, each exactly. A name can be given up and
//! registered again by a stranger, and the beginning of a `sub` is a name; so neither is enough, and [`refusals`] says what
//! would be. No token is verified here, and no factor is asked for: a pipeline has none, and somebody countersigns.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    change::RoleName,
    identity::{SpiffeId, TrustDomain},
};

/// The name of an issuer in `mesh.toml`.
pub type IssuerName = Arc<str>;
/// The name of a pipeline in `mesh.toml`.
pub type PipelineName = Arc<str>;

/// Issuers and pipelines of one mesh at most, each.
pub const PIPELINES_MAX: usize = 1_000;
/// Claims of one pipeline at most.
pub const CLAIMS_MAX: usize = 16;
/// Longest name of a claim, issuer URL, audience or value, in bytes.
pub const CLAIM_BYTES_MAX: usize = 512;
/// What the actor of an entry begins with when a pipeline asked for it: no operator's name holds a `:`.
pub const ACTOR_PREFIX: &str = "pipeline:";

/// The issuer that every mesh has: itself, which vouches for its workloads by JWT-SVIDs. No other may be called so.
pub const MESH_ISSUER: &str = "mesh";

/// An OpenID Connect provider whose tokens are believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    /// Its identifier, exactly as its tokens and its discovery document say it.
    pub url: String,
    /// Whom its tokens must be meant for.
    pub audience: String,
}

/// An automation that may propose changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    /// Who vouches for it.
    pub issuer: IssuerName,
    /// What its token must say, each exactly.
    pub claims: BTreeMap<String, String>,
    /// What the change gate knows it as.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub roles: BTreeSet<RoleName>,
}

/// Why an issuer or a pipeline is not taken, and how to mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The claim, when it is about one.
    pub claim: Option<String>,
    /// What is wrong, lower case, no full stop.
    pub what: String,
    /// How to mend it.
    pub help: &'static str,
}

/// Checked of every token, whatever a pipeline asks for.
const OF_EVERY_TOKEN: [&str; 6] = ["iss", "aud", "exp", "nbf", "iat", "jti"];
const GITHUB_NAMES: [&str; 6] =
    ["repository", "repository_owner", "job_workflow_ref", "workflow_ref", "repository_visibility", "actor"];
const GITHUB_IDS: [&str; 2] = ["repository_id", "repository_owner_id"];
const GITLAB_NAMES: [&str; 4] = ["project_path", "namespace_path", "user_login", "ci_config_ref_uri"];
const GITLAB_IDS: [&str; 2] = ["project_id", "namespace_id"];
/// Anybody can come to have these, or they say of what and not of whom.
const SAY_NOT_WHO: [&str; 22] = [
    "ref",
    "ref_type",
    "ref_protected",
    "ref_path",
    "head_ref",
    "base_ref",
    "sha",
    "environment",
    "environment_protected",
    "event_name",
    "pipeline_source",
    "workflow",
    "run_attempt",
    "runner_environment",
    "deployment_tier",
    "email",
    "email_verified",
    "name",
    "preferred_username",
    "user_email",
    "organization_slug",
    "pipeline_slug",
];
const GITHUB: &str = "https://token.actions.githubusercontent.com";
const GITLAB: &str = "https://gitlab.com";

impl Issuer {
    /// Everything that is wrong with it.
    pub fn refusals(&self) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let mut refuse = |what: String, help| refusals.push(Refusal { claim: None, what, help });
        if !is_issuer_url(&self.url) {
            let help =
                "give the issuer as its tokens say it: https://HOST, no query; http only for this machine itself";
            refuse("an issuer is an https URL".to_owned(), help);
        }
        if !is_plain_text(&self.audience) {
            let help = "give a name that is this mesh's own, like \"countersign:shop.example\"";
            refuse(format!("an audience has 1 to {CLAIM_BYTES_MAX} printable characters"), help);
        }
        refusals
    }
}

/// Everything that is wrong with what a workload is matched by that proposes with its SVID: its `sub`, which names one service of
/// `trust_domain` and nothing else.
pub fn workload_refusals(trust_domain: &TrustDomain, claims: &BTreeMap<String, String>) -> Vec<Refusal> {
    let named = claims.get("sub").and_then(|sub| SpiffeId::parse(sub).ok());
    let is_ours = |id: &SpiffeId| id.trust_domain() == trust_domain.as_str() && id.service().is_some();
    if claims.len() == 1 && named.as_ref().is_some_and(is_ours) {
        return Vec::new();
    }
    let claim = claims.contains_key("sub").then(|| "sub".to_owned());
    let what = format!("a workload is matched by its SPIFFE ID: sub = \"spiffe://{trust_domain}/SERVICE\"");
    vec![Refusal { claim, what, help: "name the service that proposes, and nothing beside it" }]
}

/// Everything that is wrong with what a pipeline of the issuer at `url` is matched by.
///
/// INVARIANT (matched-on-ids): a pipeline is matched by at least one claim that its provider gives to nobody else, and by no
/// part of a claim.
pub fn refusals(url: Option<&str>, claims: &BTreeMap<String, String>) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut refuse = |claim: Option<&str>, what: String, help| {
        refusals.push(Refusal { claim: claim.map(str::to_owned), what, help });
    };
    if claims.len() > CLAIMS_MAX {
        refuse(None, format!("a pipeline has at most {CLAIMS_MAX} claims"), "leave some out");
    }
    for (claim, value) in claims {
        let claim = claim.as_str();
        if !is_plain_text(claim) || !is_plain_text(value) {
            let what = format!("a claim and its value have 1 to {CLAIM_BYTES_MAX} printable characters");
            refuse(Some(claim), what, "give it as the token says it");
        } else if value.contains('*') {
            let what = format!("`{claim}` has a `*`, and claims are compared exactly");
            refuse(Some(claim), what, "name each pipeline, with the ids of what it may come from");
        } else if OF_EVERY_TOKEN.contains(&claim) {
            refuse(Some(claim), format!("`{claim}` is verified of every token"), "leave it out");
        }
    }
    let has = |names: &[&str]| names.iter().any(|name| claims.contains_key(*name));
    let is_github = url == Some(GITHUB) || has(&GITHUB_NAMES);
    let is_gitlab = url == Some(GITLAB) || has(&GITLAB_NAMES);
    if (is_github || is_gitlab || has(&GITHUB_IDS) || has(&GITLAB_IDS)) && claims.contains_key("sub") {
        let what = "`sub` is made of names here, which a stranger can register once they are free".to_owned();
        refuse(Some("sub"), what, "match the parts of it instead: repository_id or project_id, and ref or environment");
    }
    if is_github && !has(&GITHUB_IDS) {
        let what = "a repository is matched by its id: its name can come to be somebody else's".to_owned();
        refuse(None, what, "add repository_id (`gh api repos/OWNER/NAME --jq .id`) or repository_owner_id");
    } else if is_gitlab && !has(&GITLAB_IDS) {
        let what = "a project is matched by its id: its path can come to be somebody else's".to_owned();
        refuse(None, what, "add project_id (on the project's page) or namespace_id");
    } else if claims.keys().all(|claim| SAY_NOT_WHO.contains(&claim.as_str())) {
        let what = "no claim says whose pipeline it is".to_owned();
        refuse(None, what, "add one that the issuer gives to nobody else: repository_id, project_id, sub");
    }
    refusals
}

pub(crate) fn is_plain_text(given: &str) -> bool {
    (1..=CLAIM_BYTES_MAX).contains(&given.len()) && !given.chars().any(char::is_control)
}

/// "A URL using the https scheme with no query or fragment component" (OpenID Connect Discovery 1.0, 3); http is for a provider
/// on the same machine, which nobody stands between.
fn is_issuer_url(given: &str) -> bool {
    let rest = match (given.strip_prefix("https://"), given.strip_prefix("http://")) {
        (Some(rest), _) => rest,
        (None, Some(rest)) if is_loopback(host_of(rest)) => rest,
        _ => return false,
    };
    let allowed = |b: u8| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'@' | b'\\' | b'"' | b'<' | b'>' | b'%');
    given.len() <= CLAIM_BYTES_MAX && !host_of(rest).is_empty() && rest.bytes().all(allowed)
}

fn host_of(rest: &str) -> &str {
    let authority = rest.split('/').next().unwrap_or_default();
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn is_loopback(host: &str) -> bool {
    matches!(host, "localhost" | "127.0.0.1" | "[::1]")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PROVES (matched-on-ids)
    #[test]
    fn a_pipeline_is_matched_by_what_its_provider_gives_to_nobody_else() {
        let github = Some(GITHUB);
        let (gitlab, other) = (Some(GITLAB), Some("https://ci.example"));
        for (case, url, claims, refused) in [
            ("the id of a repository", github, &[("repository_id", "7")][..], None),
            ("an owner's", github, &[("repository_owner_id", "7"), ("ref", "refs/heads/main")], None),
            ("a name with its id", github, &[("repository", "a/b"), ("repository_id", "7")], None),
            ("a name alone", github, &[("repository", "a/b")], Some("by its id")),
            ("a name alone, at a server of one's own", other, &[("repository", "a/b")], Some("by its id")),
            ("an environment alone", github, &[("environment", "production")], Some("by its id")),
            ("a workflow alone", other, &[("job_workflow_ref", "a/b/.github/w.yml@main")], Some("by its id")),
            ("a sub", github, &[("sub", "repo:a/b:ref:refs/heads/main")], Some("made of names")),
            ("a sub beside the id", github, &[("sub", "repo:a/b"), ("repository_id", "7")], Some("made of names")),
            ("the id of a project", gitlab, &[("project_id", "7"), ("ref_protected", "true")], None),
            ("a path alone", gitlab, &[("project_path", "a/b")], Some("by its id")),
            ("a path alone, at a server of one's own", other, &[("project_path", "a/b")], Some("by its id")),
            ("a sub of another issuer", other, &[("sub", "robot-7")], None),
            ("a branch of anybody", other, &[("ref", "refs/heads/main")], Some("whose pipeline")),
            ("nothing", other, &[], Some("whose pipeline")),
            ("a wildcard", github, &[("repository_id", "7"), ("ref", "refs/heads/*")], Some("compared exactly")),
            ("an audience", other, &[("sub", "x"), ("aud", "y")], Some("verified of every token")),
            ("an empty value", other, &[("sub", "")], Some("printable")),
        ] {
            let claims = claims.iter().map(|(claim, value)| (claim.to_string(), value.to_string())).collect();
            let found = refusals(url, &claims);
            match refused {
                None => assert_eq!(found, [], "{case}"),
                Some(what) => assert!(found.iter().any(|refusal| refusal.what.contains(what)), "{case}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_workload_that_proposes_is_matched_by_its_own_name_and_nothing_else() {
        let shop = TrustDomain::parse("shop.example").unwrap();
        for (claims, is_taken) in [
            (&[("sub", "spiffe://shop.example/deployer")][..], true),
            (&[("sub", "spiffe://shop.example/countersign/agent/h1")], false),
            (&[("sub", "spiffe://other.example/deployer")], false),
            (&[("sub", "spiffe://shop.example")], false),
            (&[("sub", "deployer")], false),
            (&[("sub", "spiffe://shop.example/deployer"), ("ref", "main")], false),
            (&[("ref", "main")], false),
            (&[], false),
        ] {
            let claims = claims.iter().map(|(claim, value)| (claim.to_string(), value.to_string())).collect();
            assert_eq!(workload_refusals(&shop, &claims).is_empty(), is_taken, "{claims:?}");
        }
    }

    #[test]
    fn an_issuer_is_an_https_url_and_http_is_for_this_machine() {
        for (url, is_taken) in [
            ("https://token.actions.githubusercontent.com", true),
            ("https://gitlab.example:8443/oidc", true),
            ("http://localhost:9000", true),
            ("http://127.0.0.1:9000/a", true),
            ("http://[::1]:9000", true),
            ("http://ci.example", false),
            ("http://localhost.ci.example", false),
            ("http://127.0.0.1@ci.example", false),
            ("https://", false),
            ("https:///a", false),
            ("https://ci.example?x", false),
            ("https://ci.example#x", false),
            ("https://a@ci.example", false),
            ("https://ci.example/a b", false),
            ("ftp://ci.example", false),
            ("", false),
        ] {
            let issuer = Issuer { url: url.into(), audience: "mesh".into() };
            assert_eq!(issuer.refusals().is_empty(), is_taken, "{url}");
        }
        let nobody = Issuer { url: "https://ci.example".into(), audience: String::new() };
        assert_eq!(nobody.refusals().len(), 1);
    }
}
