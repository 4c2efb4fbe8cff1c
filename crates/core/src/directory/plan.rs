//! From a directory and a mesh to the changes that make the mesh what the directory says.

use std::collections::BTreeMap;

use super::Directory;
use crate::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Revision},
    identity::TrustDomain,
    state::{MeshState, PolicyRef},
};

/// What has to change, planned on a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The changes, in an order in which they fold: what is referred to comes before what refers to it.
    pub change_set: ChangeSet,
    /// The policy texts and contracts that they bring.
    pub bodies: Bodies,
    /// How many operators can sign, when they are too few for the seal that the directory asks for: it is not planned yet.
    pub too_few_signers: Option<usize>,
}

/// The directory is about another mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the mesh is `{held}`, and `mesh.toml` says `{given}`: a trust domain is for life")]
pub struct TrustDomainMoved {
    /// What the mesh is.
    pub held: TrustDomain,
    /// What the directory says.
    pub given: TrustDomain,
}

/// Plans the changes that lead from `state`, at `revision`, to what `directory` says.
pub fn plan(directory: &Directory, state: &MeshState, revision: Revision) -> Result<Plan, TrustDomainMoved> {
    let mut changes = Vec::new();
    match &state.trust_domain {
        None => changes.push(Change::CreateMesh { trust_domain: directory.trust_domain.clone() }),
        Some(held) if *held == directory.trust_domain => {}
        Some(held) => {
            return Err(TrustDomainMoved { held: held.clone(), given: directory.trust_domain.clone() });
        }
    }
    let mut bodies = Bodies::default();
    for (name, service) in &directory.services {
        if state.services.get(name).is_none_or(|held| held.spec != service.spec) {
            if let Some(contract) = &service.contract {
                bodies.insert(contract.to_body());
            }
            changes.push(Change::DeclareService { name: name.clone(), spec: service.spec.clone() });
        }
    }
    let mut changes = quarantined(changes, state);
    for (name, members) in &directory.roles {
        if state.roles.get(name) != Some(members) {
            changes.push(Change::SetRole { name: name.clone(), members: members.clone() });
        }
    }
    for (id, policy) in &directory.policies {
        let body = Digest::of(policy.text.as_bytes());
        if state.policies.get(id) != Some(&PolicyRef { file: policy.file.clone(), body }) {
            bodies.insert(policy.text.clone());
            changes.push(Change::SetPolicy { id: id.clone(), file: policy.file.clone(), body });
        }
    }
    for (id, policy) in &directory.gate {
        let body = Digest::of(policy.text.as_bytes());
        if state.gate.get(id) != Some(&PolicyRef { file: policy.file.clone(), body }) {
            bodies.insert(policy.text.clone());
            changes.push(Change::SetGatePolicy { id: id.clone(), file: policy.file.clone(), body });
        }
    }
    for (name, route) in &directory.routes {
        if state.routes.get(name) != Some(route) {
            changes.push(Change::SetRoute { name: name.clone(), route: route.clone() });
        }
    }
    for (name, issuer) in &directory.issuers {
        if state.issuers.get(name) != Some(issuer) {
            changes.push(Change::SetIssuer { name: name.clone(), issuer: issuer.clone() });
        }
    }
    for (name, pipeline) in &directory.pipelines {
        if state.pipelines.get(name) != Some(pipeline) {
            changes.push(Change::SetPipeline { name: name.clone(), pipeline: pipeline.clone() });
        }
    }
    for (name, sign_in) in &directory.sign_ins {
        if state.sign_ins.get(name) != Some(sign_in) {
            changes.push(Change::SetSignIn { name: name.clone(), sign_in: sign_in.clone() });
        }
    }
    for (name, client) in &directory.clients {
        if state.clients.get(name) != Some(client) {
            changes.push(Change::SetClient { name: name.clone(), client: client.clone() });
        }
    }
    changes.extend(gone(&state.clients, &directory.clients).map(|name| Change::RemoveClient { name }));
    changes.extend(gone(&state.sign_ins, &directory.sign_ins).map(|name| Change::RemoveSignIn { name }));
    changes.extend(gone(&state.pipelines, &directory.pipelines).map(|name| Change::RemovePipeline { name }));
    changes.extend(gone(&state.issuers, &directory.issuers).map(|name| Change::RemoveIssuer { name }));
    changes.extend(gone(&state.routes, &directory.routes).map(|name| Change::RemoveRoute { name }));
    changes.extend(gone(&state.gate, &directory.gate).map(|id| Change::RemoveGatePolicy { id }));
    changes.extend(gone(&state.policies, &directory.policies).map(|id| Change::RemovePolicy { id }));
    changes.extend(gone(&state.roles, &directory.roles).map(|name| Change::RemoveRole { name }));
    changes.extend(gone(&state.services, &directory.services).map(|name| Change::RemoveService { name }));
    if directory.authenticators != state.authenticators {
        changes.push(match &directory.authenticators {
            Some(authenticators) => Change::SetAuthenticators { authenticators: authenticators.clone() },
            None => Change::RemoveAuthenticators {},
        });
    }
    if directory.lifetimes != state.lifetimes {
        changes.push(match directory.lifetimes {
            Some(lifetimes) => Change::SetLifetimes { lifetimes },
            None => Change::RemoveLifetimes {},
        });
    }
    let mut too_few_signers = None;
    if let Some(seal) = directory.seal.filter(|seal| state.seal != Some(*seal)) {
        let signers = state.operators.values().filter(|operator| operator.can_sign()).count();
        if seal.quorum as usize <= signers {
            changes.push(Change::SealSettings { quorum: seal.quorum });
        } else {
            too_few_signers = Some(signers);
        }
    }
    Ok(Plan { change_set: ChangeSet { base: revision, changes }, bodies, too_few_signers })
}

/// The changes, with the quarantine of each service that they bring to a protected mesh after its declaration.
pub fn quarantined(changes: Vec<Change>, state: &MeshState) -> Vec<Change> {
    let quarantine = |change: &Change| match change {
        Change::DeclareService { name, .. } if state.is_protected() && !state.services.contains_key(name) => {
            Some(Change::QuarantineService { name: name.clone() })
        }
        _ => None,
    };
    changes
        .into_iter()
        .flat_map(|change| {
            let quarantine = quarantine(&change);
            [Some(change), quarantine]
        })
        .flatten()
        .collect()
}

fn gone<K: Ord + Clone, A, B>(held: &BTreeMap<K, A>, wanted: &BTreeMap<K, B>) -> impl Iterator<Item = K> {
    held.keys().filter(|key| !wanted.contains_key(*key)).cloned()
}

impl Plan {
    /// Whether the mesh is what the directory says already.
    pub fn is_empty(&self) -> bool {
        self.change_set.changes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::{Files, parse};

    fn directory(mesh: &str, roles: &str, routes: &str, policy: &str) -> Directory {
        let files: Files = [
            ("mesh.toml", format!("trust_domain = \"shop.example\"\n{mesh}")),
            ("roles.toml", roles.to_owned()),
            ("routes.toml", routes.to_owned()),
            ("policies/all.cedar", policy.to_owned()),
        ]
        .map(|(path, text)| (path.to_owned(), text))
        .into();
        parse(&files).unwrap_or_else(|mistakes| panic!("{:#?}", mistakes.all()))
    }

    const TWO: &str = "[services]\nweb = { port = 1 }\ncatalog = { port = 2 }\n";
    const FRONT: &str = "[roles.front]\nmembers = [\"web\"]\n";
    const ROUTE: &str = "[routes.slow]\nservice = \"catalog\"\ntimeout = \"2s\"\n";
    const POLICY: &str =
        "@id(\"reads\") permit (principal in Role::\"front\", action, resource in Service::\"catalog\");";

    /// What the plan from `before` to `after` says, after proving that it leads there.
    fn planned(before: &Directory, after: &Directory) -> Vec<String> {
        let from = MeshState::default();
        let from = from.apply_all(&plan(before, &from, Revision(0)).unwrap().change_set).unwrap();
        let plan_after = plan(after, &from, Revision(1)).unwrap();
        assert_eq!(plan_after.change_set.base, Revision(1));
        let to = from.apply_all(&plan_after.change_set).unwrap();
        assert!(plan(after, &to, Revision(2)).unwrap().is_empty());
        let brought = plan_after.change_set.changes.iter().filter_map(Change::body);
        assert!(brought.eq(plan_after.bodies.iter().map(|(digest, _)| *digest)), "a text for each policy that changes");
        plan_after.change_set.changes.iter().map(|change| format!("{} {}", change.kind(), change.subject())).collect()
    }

    #[test]
    fn a_plan_holds_what_differs_and_what_is_referred_to_comes_first() {
        let nothing = directory("", "", "", "");
        let all = directory(TWO, FRONT, ROUTE, POLICY);
        for (case, before, after, expected) in [
            ("nothing", &all, &all, vec![]),
            (
                "all",
                &nothing,
                &all,
                vec![
                    "declare_service service catalog",
                    "declare_service service web",
                    "set_role role front",
                    "set_policy policy reads",
                    "set_route route slow",
                ],
            ),
            (
                "nothing left",
                &all,
                &nothing,
                vec![
                    "remove_route route slow",
                    "remove_policy policy reads",
                    "remove_role role front",
                    "remove_service service catalog",
                    "remove_service service web",
                ],
            ),
            (
                "a service that only this host runs otherwise",
                &all,
                &directory(&TWO.replace("port = 1", "port = 9"), FRONT, ROUTE, POLICY),
                vec![],
            ),
            (
                "a service that declares otherwise",
                &all,
                &directory(&TWO.replace("port = 1", "port = 1, namespace = \"x\""), FRONT, ROUTE, POLICY),
                vec!["declare_service service web"],
            ),
            (
                "a role, a route and a policy",
                &all,
                &directory(
                    TWO,
                    &FRONT.replace("\"web\"", ""),
                    &ROUTE.replace("2s", "3s"),
                    &POLICY.replace("permit", "forbid"),
                ),
                vec!["set_role role front", "set_policy policy reads", "set_route route slow"],
            ),
        ] {
            assert_eq!(planned(before, after), expected, "{case}");
        }
    }

    #[test]
    fn a_new_service_of_a_protected_mesh_is_planned_into_quarantine_and_one_that_is_there_is_not() {
        use crate::operator::{EnrolledFactor, Operator};
        let (bare, all) = (directory("", "", "", ""), directory(TWO, "", "", ""));
        let mut state = MeshState::default();
        state = state.apply_all(&plan(&bare, &state, Revision(0)).unwrap().change_set).unwrap();
        let factors = [(crate::identity::FactorId::parse("one").unwrap(), EnrolledFactor::Totp)].into();
        let owner = Operator { factors, ..Operator::default() };
        state.operators.insert(crate::identity::OperatorName::parse("alice").unwrap(), owner);
        let planned = plan(&all, &state, Revision(1)).unwrap().change_set;
        let kinds: Vec<_> = planned.changes.iter().map(|one| format!("{} {}", one.kind(), one.subject())).collect();
        assert_eq!(
            kinds,
            [
                "declare_service service catalog",
                "quarantine_service service catalog",
                "declare_service service web",
                "quarantine_service service web"
            ]
        );
        let quarantined = state.apply_all(&planned).unwrap();
        assert!(plan(&all, &quarantined, Revision(2)).unwrap().is_empty());
        let other = directory(&TWO.replace("port = 1", "port = 1, namespace = \"x\""), "", "", "");
        let planned = plan(&other, &quarantined, Revision(2)).unwrap().change_set.changes;
        assert_eq!(planned.iter().map(Change::kind).collect::<Vec<_>>(), ["declare_service"]);
    }

    #[test]
    fn the_change_gate_is_planned_like_the_request_gate() {
        let bare = directory(TWO, "", "", "");
        let mut files: Files = [("mesh.toml".to_owned(), format!("trust_domain = \"shop.example\"\n{TWO}"))].into();
        files.insert("gate/all.cedar".into(), "@id(\"all\") permit (principal, action, resource);".into());
        let gated = parse(&files).unwrap_or_else(|mistakes| panic!("{:#?}", mistakes.all()));
        assert_eq!(planned(&bare, &gated), ["set_gate_policy gate policy all"]);
        assert_eq!(planned(&gated, &bare), ["remove_gate_policy gate policy all"]);
        files.insert(
            "gate/more.cedar".into(),
            "@id(\"all\") forbid (principal, action, resource == Service::\"web\");".into(),
        );
        let mistakes = parse(&files).unwrap_err();
        assert_eq!(mistakes.all()[0].to_string(), "policy id `all` is taken");
    }

    #[test]
    fn pipelines_are_planned_after_the_issuers_that_they_name_and_go_before_them() {
        let bare = directory(TWO, "", "", "");
        let ci = "[issuers.ci]\nurl = \"https://ci.example\"\naudience = \"mesh\"\n\
            [pipelines.deploy]\nissuer = \"ci\"\nclaims = { project_id = \"7\" }\n";
        let with = directory(&format!("{TWO}{ci}"), "", "", "");
        assert_eq!(planned(&bare, &with), ["set_issuer issuer ci", "set_pipeline pipeline deploy"]);
        assert_eq!(planned(&with, &bare), ["remove_pipeline pipeline deploy", "remove_issuer issuer ci"]);
        let other = directory(&format!("{TWO}{}", ci.replace("\"7\"", "\"8\"")), "", "", "");
        assert_eq!(planned(&with, &other), ["set_pipeline pipeline deploy"]);
    }

    #[test]
    fn a_list_of_authenticators_is_planned_and_goes_with_its_table() {
        use crate::assurance::authenticators::tests::{LEAF, NAMESAKE, ROOT};
        let bare = directory(TWO, "", "", "");
        let model = "\"ee882879-721c-4913-9775-3dfcce97072a\"";
        let listed = |models: &str| {
            format!("{TWO}[factors]\nauthenticators = [{models}]\nattestation_roots = \"\"\"\n{ROOT}\"\"\"\n")
        };
        let with = directory(&listed(model), "", "", "");
        assert_eq!(planned(&bare, &with), ["set_authenticators authenticators"]);
        assert_eq!(planned(&with, &bare), ["remove_authenticators authenticators"]);
        let other = directory(&listed("\"2fc0579f-8113-47ea-b116-bb5a8db9202a\""), "", "", "");
        assert_eq!(planned(&with, &other), ["set_authenticators authenticators"]);
        for (given, expected) in [
            ("[factors]\n".to_owned(), "`authenticators` is missing"),
            (format!("[factors]\nauthenticators = [{model}]\n"), "`attestation_roots` is missing"),
            (listed(""), "`authenticators` is empty"),
            (listed("\"yubikey\""), "`yubikey` is not a model of an authenticator"),
            (listed(&format!("{model}, {model}")), "`ee882879-721c-4913-9775-3dfcce97072a` stands here twice"),
            (listed(model).replace(ROOT, LEAF), "`attestation_roots` cannot be read"),
            (listed(model).replace(ROOT, &[ROOT, NAMESAKE].concat()), "two roots are called `O=Keys, CN=Keys Root`"),
            (listed(model).replace("BEGIN", "BEGUN"), "`attestation_roots` cannot be read"),
        ] {
            let files = [("mesh.toml".to_owned(), format!("trust_domain = \"shop.example\"\n{given}"))].into();
            let mistakes = parse(&files).unwrap_err();
            assert_eq!(mistakes.all()[0].to_string(), expected, "{given}");
        }
    }

    #[test]
    fn lifetimes_are_planned_and_go_with_their_table() {
        let bare = directory(TWO, "", "", "");
        let with = directory(&format!("{TWO}[authority]\nsvid_lifetime = \"30m\"\n"), "", "", "");
        assert_eq!(planned(&bare, &with), ["set_lifetimes lifetimes"]);
        assert_eq!(planned(&with, &bare), ["remove_lifetimes lifetimes"]);
        assert_eq!(with.lifetimes.map(|found| (found.svid_seconds, found.root_days)), Some((1800, 3650)));
        for (given, expected) in [
            ("svid_lifetime = \"4m\"", "`svid_lifetime` is out of bounds"),
            ("svid_lifetime = \"25h\"", "`svid_lifetime` is out of bounds"),
            ("svid_lifetime = \"an hour\"", "`an hour` is not a duration"),
            ("root_lifetime = \"10000d\"", "`root_lifetime` is out of bounds"),
            ("root_lifetime = \"10y\"", "`10y` is not a number of days"),
            ("intermediate_lifetime = \"6d\"", "`intermediate_lifetime` is out of bounds"),
            ("root_lifetime = \"90d\"", "the root would not outlive two intermediates"),
        ] {
            let text = format!("trust_domain = \"shop.example\"\n[authority]\n{given}\n");
            let mistakes = parse(&[("mesh.toml".to_owned(), text)].into()).unwrap_err();
            assert_eq!(mistakes.all()[0].to_string(), expected, "{given}");
        }
    }

    #[test]
    fn a_sign_in_is_planned_after_the_issuer_that_it_names_and_goes_before_it() {
        let bare = directory(TWO, "", "", "");
        let corp = "[issuers.corp]\nurl = \"https://id.example\"\naudience = \"mesh\"\n\
            [sign_in.corp]\nissuer = \"corp\"\nclient_id = \"mesh\"\nroles = { staff = [\"editor\"] }\n";
        let with = directory(&format!("{TWO}{corp}"), "", "", "");
        assert_eq!(planned(&bare, &with), ["set_issuer issuer corp", "set_sign_in sign-in corp"]);
        assert_eq!(planned(&with, &bare), ["remove_sign_in sign-in corp", "remove_issuer issuer corp"]);
        assert_eq!(with.sign_ins["corp"].groups_claim, "groups");
        let other = directory(&format!("{TWO}{}", corp.replace("editor", "owner")), "", "", "");
        assert_eq!(planned(&with, &other), ["set_sign_in sign-in corp"]);
    }

    #[test]
    fn a_sign_in_that_lets_nobody_in_or_names_no_issuer_is_a_mistake() {
        let corp = "trust_domain = \"shop.example\"\n[issuers.corp]\nurl = \"https://id.example\"\naudience = \"mesh\"\n\
            [sign_in.corp]\nissuer = \"corp\"\nclient_id = \"mesh\"\nroles = { staff = [\"editor\"] }\n";
        for (from, to, what) in [
            ("issuer = \"corp\"", "issuer = \"crop\"", "there is no issuer `crop`"),
            ("issuer = \"corp\"\n", "", "sign-in `corp` has no `issuer`"),
            ("client_id = \"mesh\"\n", "", "sign-in `corp` has no `client_id`"),
            ("client_id = \"mesh\"", "client_id = \"\"", "a client id has 1 to 512 printable characters"),
            ("client_id = \"mesh\"", "client_id = \"mesh\"\nclient_secret = \"x\"", "`client_secret`"),
            ("client_id = \"mesh\"", "client_id = \"mesh\"\ngroups_claim = \"\"", "the name of a claim has 1 to 512"),
            ("{ staff = [\"editor\"] }", "{}", "a sign-in maps 1 to 256 groups"),
            ("[\"editor\"]", "[]", "group `staff` has no role"),
            ("[\"editor\"]", "[\"a b\"]", "`a b` is not the name of a role"),
            ("[\"editor\"]", "\"editor\"", "must be an array of strings"),
        ] {
            let files: Files = [("mesh.toml".to_owned(), corp.replacen(from, to, 1))].into();
            let mistakes = parse(&files).unwrap_err();
            let all: Vec<String> = mistakes.all().iter().map(ToString::to_string).collect();
            assert!(all.iter().any(|mistake| mistake.contains(what)), "{what}: {all:?}");
        }
    }

    #[test]
    fn a_seal_is_planned_once_as_many_can_sign_and_never_taken_off() {
        use crate::operator::{EnrolledFactor, Operator, Seal, SigningKey};
        let sealed = directory("[seal]\nquorum = 1\n", "", "", "");
        let created = MeshState::default();
        let mut state = created.apply_all(&plan(&sealed, &created, Revision(0)).unwrap().change_set).unwrap();
        let waiting = plan(&sealed, &state, Revision(1)).unwrap();
        assert!(waiting.is_empty());
        assert_eq!(waiting.too_few_signers, Some(0));
        let cose = "a4010103272006215820d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
        let key = crate::assurance::webauthn::PublicKey::parse(&hex::decode(cose).unwrap()).unwrap();
        let relying_party = crate::assurance::webauthn::RelyingParty {
            id: "localhost".into(),
            origins: vec!["http://localhost:7449".into()],
        };
        let key = EnrolledFactor::Roaming(SigningKey { key, backup_eligible: false, relying_party, model: None });
        let id = crate::identity::FactorId::parse("AQ").unwrap();
        let alice = Operator { roles: Default::default(), factors: [(id, key)].into() };
        state.operators.insert(crate::identity::OperatorName::parse("alice").unwrap(), alice);
        let sealing = plan(&sealed, &state, Revision(1)).unwrap();
        assert_eq!(sealing.change_set.changes, [Change::SealSettings { quorum: 1 }]);
        state.seal = Some(Seal { quorum: 1 });
        assert!(plan(&sealed, &state, Revision(1)).unwrap().is_empty());
        assert!(plan(&directory("", "", "", ""), &state, Revision(1)).unwrap().is_empty(), "it stays sealed");
        let more = plan(&directory("[seal]\nquorum = 2\n", "", "", ""), &state, Revision(1)).unwrap();
        assert_eq!((more.is_empty(), more.too_few_signers), (true, Some(1)));
    }

    #[test]
    fn a_mesh_keeps_its_trust_domain() {
        let held = MeshState { trust_domain: Some(TrustDomain::parse("old.example").unwrap()), ..MeshState::default() };
        assert_eq!(
            plan(&directory("", "", "", ""), &held, Revision(1)).unwrap_err().to_string(),
            "the mesh is `old.example`, and `mesh.toml` says `shop.example`: a trust domain is for life"
        );
    }
}
