//! Sign-ins as the ledger knows them: the providers that people sign in with, and which groups there mean which roles here.
//!
//! Nobody signs in here and no token is read. A secret of the mesh at the provider is never part of it: the ledger is read by many.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    change::RoleName,
    directory::is_plain_name,
    pipeline::{CLAIM_BYTES_MAX, IssuerName, Refusal, is_plain_text},
};

/// The name of a sign-in in `mesh.toml`.
pub type SignInName = Arc<str>;

/// Sign-ins of one mesh at most.
pub const SIGN_INS_MAX: usize = 16;
/// Groups of one sign-in at most.
pub const GROUPS_MAX: usize = 256;
/// The claim that says which groups somebody is in, where nothing else is said.
pub const GROUPS_CLAIM: &str = "groups";

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

impl SignIn {
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
