//! Sign-ins as the ledger knows them: the providers that people sign in with, and which groups there mean which roles here.
//!
//! Nobody signs in here and no token is read: a [`Person`] is what was verified elsewhere. What their groups mean is looked up in the
//! mesh as it is now, never kept with them. A secret of the mesh at the provider is never part of it: the ledger is read by many.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    change::RoleName,
    directory::is_plain_name,
    pipeline::{CLAIM_BYTES_MAX, Issuer, IssuerName, Pipeline, PipelineName, Refusal, is_plain_text},
    state::MeshState,
};

/// The name of a sign-in in `mesh.toml`.
pub type SignInName = Arc<str>;

/// Sign-ins of one mesh at most.
pub const SIGN_INS_MAX: usize = 16;
/// Groups of one sign-in at most.
pub const GROUPS_MAX: usize = 256;
/// The claim that says which groups somebody is in, where nothing else is said.
pub const GROUPS_CLAIM: &str = "groups";

/// Names that no sign-in has: who signs in by it is named `NAME:…`, and would be taken for a pipeline or for whom the mesh trusts.
const RESERVED: [&str; 4] = ["pipeline", "operator", "local", "mesh"];
/// Longest name that a provider gives somebody: "It MUST NOT exceed 255 ASCII characters in length" (OpenID Connect Core 1.0, 2).
const SUBJECT_CHARS_MAX: usize = 255;

/// A provider that people sign in with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignIn {
    /// Who vouches for them.
    pub issuer: IssuerName,
    /// What the provider calls this mesh: whom its tokens for people are meant for.
    pub client_id: String,
    /// The claim that says which groups somebody is in.
    pub groups_claim: String,
    /// What each group may do here; who is in none of them is nobody.
    pub roles: BTreeMap<String, BTreeSet<RoleName>>,
}

/// Somebody whom a provider vouched for. They are no operator and have no factor here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Person {
    /// The sign-in by which they came.
    pub sign_in: SignInName,
    /// Who vouched for them: the URL.
    pub issuer: String,
    /// Whom that was said to.
    pub client_id: String,
    /// The claim that said which groups they are in.
    pub groups_claim: String,
    /// What the provider calls them, in a way that is never given again.
    pub subject: String,
    /// The groups that they were in when they signed in.
    pub groups: BTreeSet<String>,
}

impl Person {
    /// Whether they are the same, in whatever groups.
    pub fn is(&self, other: &Self) -> bool {
        let who = |person: &Self| (person.sign_in.clone(), person.issuer.clone(), person.subject.clone());
        who(self) == who(other)
    }

    /// The same in the groups that mean something in the mesh as it is. Which others they are in is nobody's business here.
    pub fn as_mapped(self, state: &MeshState) -> Self {
        let mapped = state.sign_ins.get(&self.sign_in).map(|sign_in| &sign_in.roles);
        let groups = self.groups.into_iter().filter(|group| mapped.is_some_and(|mapped| mapped.contains_key(group)));
        Self { groups: groups.collect(), ..self }
    }

    /// What their groups mean in the mesh as it is.
    ///
    /// INVARIANT (groups-as-mapped-now): nothing, once the sign-in is gone, asks another provider, in another name or for another
    /// claim, or maps none of the groups.
    pub fn roles(&self, state: &MeshState) -> BTreeSet<RoleName> {
        let sign_in = state.sign_ins.get(&self.sign_in).filter(|sign_in| {
            let url = state.issuers.get(&sign_in.issuer).map(|issuer| &issuer.url);
            url == Some(&self.issuer)
                && (&sign_in.client_id, &sign_in.groups_claim) == (&self.client_id, &self.groups_claim)
        });
        let mapped = sign_in.into_iter().flat_map(|sign_in| &sign_in.roles);
        mapped.filter(|(group, _)| self.groups.contains(*group)).flat_map(|(_, roles)| roles.clone()).collect()
    }
}

/// As the ledger names them: no operator's name holds a `:`.
impl fmt::Display for Person {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.sign_in, self.subject)
    }
}

/// Whether a provider's name for somebody can be one here.
pub fn is_subject(given: &str) -> bool {
    (1..=SUBJECT_CHARS_MAX).contains(&given.len()) && given.bytes().all(|b| b.is_ascii_graphic())
}

/// What is wrong with the name of a sign-in.
pub fn name_refusal(name: &str) -> Option<Refusal> {
    RESERVED.iter().any(|reserved| reserved.eq_ignore_ascii_case(name)).then(|| Refusal {
        claim: None,
        what: format!("`{name}` is no name for a sign-in: `{name}:…` would be taken for somebody else"),
        help: "give it another name",
    })
}

impl SignIn {
    /// The pipeline, if there is one, that a token for people could be taken for: its tokens come from the same issuer and are meant
    /// for the same.
    pub fn is_confused_with<'p>(
        &self,
        issuers: &BTreeMap<IssuerName, Issuer>,
        pipelines: &'p BTreeMap<PipelineName, Pipeline>,
    ) -> Option<&'p PipelineName> {
        let is_meant_for_both = issuers.get(&self.issuer).is_some_and(|issuer| issuer.audience == self.client_id);
        let mut same = pipelines.iter().filter(|(_, pipeline)| is_meant_for_both && pipeline.issuer == self.issuer);
        same.next().map(|(name, _)| name)
    }

    /// Everything that is wrong with it; a refusal about one key of the table names that key.
    pub fn refusals(&self) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let mut refuse = |key: &str, what: String, help| {
            refusals.push(Refusal { claim: Some(key.to_owned()), what, help });
        };
        if !is_plain_text(&self.client_id) {
            let what = format!("a client id has 1 to {CLAIM_BYTES_MAX} printable characters");
            refuse("client_id", what, "give it as the provider does where the mesh is registered");
        }
        if !is_plain_text(&self.groups_claim) {
            let what = format!("the name of a claim has 1 to {CLAIM_BYTES_MAX} printable characters");
            refuse("groups_claim", what, "give it as the provider's tokens say it, or leave it out for `groups`");
        }
        if !(1..=GROUPS_MAX).contains(&self.roles.len()) {
            let what = format!("a sign-in maps 1 to {GROUPS_MAX} groups");
            refuse("roles", what, "say what a group may do: roles = { mesh-editors = [\"editor\"] }");
        }
        for (group, roles) in &self.roles {
            let shown: String = group.chars().take(100).collect();
            if !is_plain_text(group) {
                let what = format!("a group has 1 to {CLAIM_BYTES_MAX} printable characters");
                refuse("roles", what, "give it as the provider's tokens say it");
            }
            if roles.is_empty() {
                refuse("roles", format!("group `{shown}` has no role"), "give it one, or leave it out");
            }
            if let Some(role) = roles.iter().find(|role| !is_plain_name(role)) {
                let role: String = role.chars().take(100).collect();
                let help = "a role has 1 to 64 letters, digits, `-`, `_` and `.`";
                refuse("roles", format!("`{role}` is not the name of a role"), help);
            }
        }
        refusals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> MeshState {
        let mut state = MeshState::default();
        state.issuers.insert("id".into(), Issuer { url: "https://id.example".into(), audience: "ci".into() });
        let roles = [("staff", "editor"), ("admins", "owner")];
        let sign_in = SignIn {
            issuer: "id".into(),
            client_id: "mesh".into(),
            groups_claim: "groups".into(),
            roles: roles.into_iter().map(|(group, role)| (group.to_owned(), [role.into()].into())).collect(),
        };
        state.sign_ins.insert("corp".into(), sign_in);
        state
    }

    /// PROVES (groups-as-mapped-now)
    #[test]
    fn groups_mean_what_the_mesh_maps_them_to_now_and_nothing_of_another_provider() {
        let person = |groups: &[&str]| Person {
            sign_in: "corp".into(),
            issuer: "https://id.example".into(),
            client_id: "mesh".into(),
            groups_claim: "groups".into(),
            subject: "1234".into(),
            groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        };
        let mapped =
            |person: &Person, state: &MeshState| person.roles(state).iter().cloned().collect::<Vec<_>>().join(" ");
        let both = person(&["staff", "admins", "others"]);
        assert_eq!(mapped(&both, &state()), "editor owner");
        assert_eq!(mapped(&person(&["Staff", "others"]), &state()), "", "each group exactly");
        type Other = fn(&mut MeshState);
        let others: [(&str, Other); 5] = [
            ("another provider", |state| state.issuers.get_mut("id").unwrap().url = "https://other.example".into()),
            ("no provider", |state| drop(state.issuers.remove("id"))),
            ("another client", |state| state.sign_ins.get_mut("corp").unwrap().client_id = "other".into()),
            ("another claim", |state| state.sign_ins.get_mut("corp").unwrap().groups_claim = "roles".into()),
            ("no sign-in", |state| drop(state.sign_ins.remove("corp"))),
        ];
        for (case, other) in others {
            let mut state = state();
            other(&mut state);
            assert_eq!(mapped(&both, &state), "", "{case}");
        }
        let mut fewer = state();
        fewer.sign_ins.get_mut("corp").unwrap().roles.remove("admins");
        assert_eq!(mapped(&both, &fewer), "editor");
        assert_eq!(both.to_string(), "corp:1234");
        let told = both.as_mapped(&fewer);
        assert_eq!((told.groups.len(), mapped(&told, &fewer)), (1, "editor".to_owned()), "and nothing of the others");
    }

    #[test]
    fn nobody_who_signs_in_is_named_like_a_pipeline_or_with_what_a_page_would_not_show() {
        for (name, is_taken) in
            [("corp", true), ("Pipeline", false), ("pipeline", false), ("local", false), ("pipelines", true)]
        {
            assert_eq!(name_refusal(name).is_none(), is_taken, "{name}");
        }
        let long = "a".repeat(SUBJECT_CHARS_MAX + 1);
        for (subject, is_taken) in [
            ("1234", true),
            ("auth0|5f7c8ec7", true),
            ("", false),
            ("a b", false),
            ("a\nb", false),
            ("\u{202e}a", false),
            (&*long, false),
            (&long[1..], true),
        ] {
            assert_eq!(is_subject(subject), is_taken, "{subject:?}");
        }
    }

    #[test]
    fn a_token_for_people_is_none_for_a_pipeline() {
        let mut state = state();
        let pipeline =
            Pipeline { issuer: "id".into(), claims: [("sub".to_owned(), "robot".to_owned())].into(), roles: [].into() };
        state.pipelines.insert("deploy".into(), pipeline);
        let confused = |state: &MeshState| {
            state.sign_ins["corp"].is_confused_with(&state.issuers, &state.pipelines).map(ToString::to_string)
        };
        assert_eq!(confused(&state), None, "the client id is no audience of pipelines");
        state.issuers.get_mut("id").unwrap().audience = "mesh".into();
        assert_eq!(confused(&state).as_deref(), Some("deploy"));
        state.pipelines.clear();
        assert_eq!(confused(&state), None, "there is none");
    }
}
