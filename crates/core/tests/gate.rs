//! The change gate from outside: the shipped one as a matrix, the rules that no policy can change, and docs/gate.md held to them.

use std::{collections::BTreeSet, env, fmt::Write as _, fs, path::Path, sync::Arc};

use countersign_core::{
    assurance::{
        Assurance, FactorKind, Proof,
        authenticators::Authenticators,
        webauthn::{PublicKey, RelyingParty},
    },
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Edge, Member, Revision},
    client::Client,
    gate::{
        self, Answer, Asked, Author, ChangeGate, Origin, Pipeline, Requires,
        act::{Act, AskedTo},
    },
    identity::{FactorId, OperatorName, ServiceName, TrustDomain},
    operator::{EnrolledFactor, SigningKey},
    pipeline::{self, Issuer},
    policy::Factor,
    route::Route,
    service::{Protocol, ServiceSpec},
    sign_in::{Person, SignIn},
    state::MeshState,
};
use expect_test::expect;

const NOW: i64 = 1_795_365_000;
const DOCUMENT: &str = include_str!("../../../docs/gate.md");

fn name(given: &str) -> OperatorName {
    OperatorName::parse(given).unwrap()
}

fn service(given: &str) -> ServiceName {
    ServiceName::parse(given).unwrap()
}

fn key() -> EnrolledFactor {
    let cose = "a4010103272006215820d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    let relying_party = RelyingParty { id: "mesh.example".into(), origins: vec!["https://mesh.example".into()] };
    let key = PublicKey::parse(&hex::decode(cose).unwrap()).unwrap();
    EnrolledFactor::Roaming(SigningKey { key, backup_eligible: false, relying_party, model: None })
}

fn spec(namespace: Option<&str>) -> ServiceSpec {
    let mut spec = ServiceSpec::new(Protocol::Http);
    spec.namespace = namespace.map(Into::into);
    spec
}

/// A mesh with `web` and `pay` of namespace `payments`, and these operators: name, role, whether they have a key.
fn mesh(operators: &[(&str, &str, bool)]) -> MeshState {
    let mut changes = vec![
        Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() },
        Change::DeclareService { name: service("web"), spec: spec(None) },
        Change::DeclareService { name: service("pay"), spec: spec(Some("payments")) },
    ];
    for (operator, role, has_key) in operators {
        let factor = if *has_key { key() } else { EnrolledFactor::Totp };
        let id = FactorId::parse(&format!("factor-{operator}")).unwrap();
        changes.push(Change::InviteOperator { name: name(operator), roles: [(*role).into()].into() });
        changes.push(Change::EnrollOperator { name: name(operator), id, factor });
    }
    MeshState::default().apply_all(&ChangeSet { base: Revision(0), changes }).unwrap()
}

fn shown(kinds: &[FactorKind]) -> Assurance {
    let mut assurance = Assurance::default();
    for kind in kinds {
        let is_key = kind.is_webauthn();
        assurance.add(Proof { kind: *kind, at_seconds: NOW, user_verified: is_key, device_bound: is_key });
    }
    assurance
}

fn decide(
    gate: &ChangeGate,
    state: &MeshState,
    author: &Author,
    assurance: &Assurance,
    changes: Vec<Change>,
) -> Answer {
    decide_with(gate, state, author, assurance, changes, &[])
}

fn decide_with(
    gate: &ChangeGate,
    state: &MeshState,
    author: &Author,
    assurance: &Assurance,
    changes: Vec<Change>,
    approvals: &[&str],
) -> Answer {
    decide_at_risk(gate, state, author, assurance, changes, approvals, 0)
}

fn decide_at_risk(
    gate: &ChangeGate,
    state: &MeshState,
    author: &Author,
    assurance: &Assurance,
    changes: Vec<Change>,
    approvals: &[&str],
    risk: u8,
) -> Answer {
    gate.decide(&Asked {
        author,
        change_set: &ChangeSet { base: Revision(1), changes },
        state,
        assurance,
        asked_at_seconds: NOW,
        approvals: &approvals.iter().map(|approver| name(approver)).collect::<BTreeSet<_>>(),
        origin: Origin::Socket,
        risk,
        now_seconds: NOW,
    })
}

fn decide_act(
    gate: &ChangeGate,
    state: &MeshState,
    author: &Author,
    act: Act,
    assurance: &Assurance,
    signed_in: bool,
) -> Answer {
    let (origin, risk) = (Origin::Socket, 0);
    gate.decide_act(&AskedTo { author, act, state, assurance, signed_in, origin, risk, now_seconds: NOW })
}

/// The same mesh, where people sign in with a provider: its admins are owners, its staff editors.
fn with_people(mut state: MeshState) -> MeshState {
    state.issuers.insert("id".into(), Issuer { url: "https://id.example".into(), audience: "ci".into() });
    let roles = [("admins", "owner"), ("staff", "editor")];
    let sign_in = SignIn {
        issuer: "id".into(),
        client_id: "mesh".into(),
        groups_claim: "groups".into(),
        roles: roles.into_iter().map(|(group, role)| (group.to_owned(), [role.into()].into())).collect(),
    };
    state.sign_ins.insert("corp".into(), sign_in);
    state
}

/// Somebody whom the provider says to be in this group.
fn person(group: &str) -> Author {
    Author::Person(Person {
        sign_in: "corp".into(),
        issuer: "https://id.example".into(),
        client_id: "mesh".into(),
        groups_claim: "groups".into(),
        subject: "1234".into(),
        groups: [group.to_owned()].into(),
    })
}

/// A gate of these policies.
fn own(text: &str) -> Arc<ChangeGate> {
    let (policies, mistakes) = gate::read_file("gate/own.cedar", text);
    assert!(mistakes.is_empty(), "{mistakes:?}");
    let mut bodies = Bodies::default();
    let changes = policies
        .into_iter()
        .map(|policy| {
            let body = bodies.insert(policy.text);
            Change::SetGatePolicy { id: policy.id, file: "gate/own.cedar".into(), body }
        })
        .collect();
    let state = mesh(&[]).apply_all(&ChangeSet { base: Revision(1), changes }).unwrap();
    ChangeGate::of(&state, |digest| bodies.get(digest).cloned()).unwrap()
}

fn pipeline(roles: &[&str]) -> pipeline::Pipeline {
    let claims = [("project_id".to_owned(), "7".to_owned())].into();
    pipeline::Pipeline { issuer: "ci".into(), claims, roles: roles.iter().map(|role| (*role).into()).collect() }
}

fn client() -> Client {
    let key = r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;
    Client { services: [service("web")].into(), keys: [key.to_owned()].into() }
}

/// The author that a pipeline of this name is.
fn proposer(named: &str) -> Author {
    Author::Pipeline(Pipeline {
        name: named.into(),
        issuer: "https://ci.example".into(),
        subject: "repo-1".into(),
        claims: ["ref=main".into()].into(),
    })
}

/// One change of each kind, about somebody or something that is there.
fn one_of(kind: &str, author: &str) -> Change {
    let (id, body): (Arc<str>, _) = ("any".into(), Digest::default());
    let file: Arc<str> = "x.cedar".into();
    let route = || serde_json::from_value::<Route>(serde_json::json!({ "service": "web", "rank": 0 })).unwrap();
    let edge = || Edge { caller: Member::Service(service("web")), operation: None };
    let other = || name(if author == "bob" { "alice" } else { "bob" });
    match kind {
        "create_mesh" => Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() },
        "declare_service" => Change::DeclareService { name: service("web"), spec: spec(None) },
        "remove_service" => Change::RemoveService { name: service("web") },
        "quarantine_service" => Change::QuarantineService { name: service("web") },
        "approve_service" => Change::ApproveService { name: service("web") },
        "suspend_service" => Change::SuspendService { name: service("web"), reason: "x".into() },
        "resume_service" => Change::ResumeService { name: service("web") },
        "approve_edge" => Change::ApproveEdge { service: service("web"), edge: edge() },
        "revoke_edge" => Change::RevokeEdge { service: service("web"), edge: edge() },
        "set_role" => Change::SetRole { name: id, members: [Member::Service(service("web"))].into() },
        "remove_role" => Change::RemoveRole { name: id },
        "set_policy" => Change::SetPolicy { id, file, body },
        "remove_policy" => Change::RemovePolicy { id },
        "set_route" => Change::SetRoute { name: id, route: route() },
        "remove_route" => Change::RemoveRoute { name: id },
        "invite_operator" => Change::InviteOperator { name: name("carol"), roles: [].into() },
        "enroll_operator" => Change::EnrollOperator { name: other(), id: FactorId::parse("f").unwrap(), factor: key() },
        "add_factor" => Change::AddFactor { operator: other(), id: FactorId::parse("f").unwrap(), factor: key() },
        "remove_factor" => Change::RemoveFactor { operator: other(), id: FactorId::parse("f").unwrap() },
        "remove_operator" => Change::RemoveOperator { name: other() },
        "set_operator_roles" => Change::SetOperatorRoles { name: other(), roles: [].into() },
        "set_gate_policy" => Change::SetGatePolicy { id, file, body },
        "remove_gate_policy" => Change::RemoveGatePolicy { id },
        "set_authenticators" => {
            Change::SetAuthenticators { authenticators: Authenticators { models: [].into(), roots: [].into() } }
        }
        "remove_authenticators" => Change::RemoveAuthenticators {},
        "set_lifetimes" => Change::SetLifetimes { lifetimes: Default::default() },
        "remove_lifetimes" => Change::RemoveLifetimes {},
        "seal_settings" => Change::SealSettings { quorum: 1 },
        "rotate_sealing_key" => Change::RotateSealingKey { fingerprint: body },
        "recover" => Change::Recover {
            operator: other(),
            id: FactorId::parse("f").unwrap(),
            factor: EnrolledFactor::Totp,
            reason: "lost".into(),
            at_seconds: NOW,
        },
        "deploy" => Change::Deploy { service: service("web"), artifacts: [body].into() },
        "set_issuer" => {
            Change::SetIssuer { name: id, issuer: Issuer { url: "https://ci.example".into(), audience: "mesh".into() } }
        }
        "remove_issuer" => Change::RemoveIssuer { name: id },
        "set_pipeline" => Change::SetPipeline { name: id, pipeline: pipeline(&[]) },
        "remove_pipeline" => Change::RemovePipeline { name: id },
        "set_client" => Change::SetClient { name: service("billing"), client: client() },
        "remove_client" => Change::RemoveClient { name: service("billing") },
        "set_sign_in" => Change::SetSignIn {
            name: id,
            sign_in: SignIn {
                issuer: "corp".into(),
                client_id: "mesh".into(),
                groups_claim: "groups".into(),
                roles: [("staff".to_owned(), ["editor".into()].into())].into(),
            },
        },
        "remove_sign_in" => Change::RemoveSignIn { name: id },
        other => panic!("no change of kind {other}"),
    }
}

fn cell(answer: &Answer) -> String {
    let requires = |requires: &Requires| {
        let factor = requires.factor.map(|factor| format!("step-up {}", factor.as_str()));
        let others = (requires.countersign > 0).then(|| format!("countersign {}", requires.countersign));
        factor.into_iter().chain(others).collect::<Vec<_>>().join(", ")
    };
    match answer {
        Answer::Permit => "permit".into(),
        Answer::StepUp(needed) | Answer::NeedsCountersign(needed) => requires(needed),
        Answer::Deny(_) => "deny".into(),
    }
}

#[test]
fn the_shipped_gate_is_this_matrix() {
    let codes = mesh(&[("alice", "owner", false), ("bob", "editor", false), ("dan", "deployer", false)]);
    let codes = with_people(codes);
    let keys = mesh(&[("alice", "owner", true), ("bob", "owner", false), ("eve", "editor", true)]);
    let (totp, roaming) = ([FactorKind::Totp], [FactorKind::Roaming]);
    let operator = |given: &str| Author::Operator(name(given));
    let columns: Vec<(&str, &MeshState, Author, &[FactorKind])> = vec![
        ("owner, nothing shown", &codes, operator("alice"), &[]),
        ("owner, code", &codes, operator("alice"), &totp),
        ("editor, code", &codes, operator("bob"), &totp),
        ("deployer, code", &codes, operator("dan"), &totp),
        ("nobody, code", &codes, operator("zoe"), &totp),
        ("pipeline", &codes, proposer("deploy"), &[]),
        ("somebody whom a provider says to be an owner", &codes, person("admins"), &[]),
        ("somebody whom a provider says to be an editor", &codes, person("staff"), &[]),
        ("owner with a key, code", &keys, operator("alice"), &totp),
        ("owner with a key, key", &keys, operator("alice"), &roaming),
        ("owner without one, code", &keys, operator("bob"), &totp),
        ("editor with a key, key", &keys, operator("eve"), &roaming),
    ];
    let mut text = String::from(
        "What the shipped change gate answers, written by a test. The last four parts are of a mesh in which somebody has a\n\
         passkey or a security key. Changes of operators and factors are about somebody else. The last rows of each part change\n\
         nothing; whoever asks is signed in.\n",
    );
    for (heading, state, author, kinds) in &columns {
        let _ = write!(text, "\n{heading}\n");
        for kind in Change::KINDS {
            let own = if let Author::Operator(name) = author { name.as_str() } else { "" };
            let answer = decide(&ChangeGate::shipped(), state, author, &shown(kinds), vec![one_of(kind, own)]);
            let _ = writeln!(text, "  {kind:<20} {}", cell(&answer));
        }
        for act in Act::ALL {
            if author.pipeline().is_some() {
                continue;
            }
            let answer = decide_act(&ChangeGate::shipped(), state, author, act, &shown(kinds), true);
            let _ = writeln!(text, "  {:<20} {}", act.as_str(), cell(&answer));
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/gate-matrix.txt");
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "docs/gate-matrix.txt is not what the gate answers; run `make docs` and read the difference"
    );
}

#[test]
fn every_kind_of_change_is_an_action_in_a_group_and_the_kinds_are_all_there() {
    let owner = mesh(&[("alice", "owner", false), ("bob", "owner", false)]);
    let alice = Author::Operator(name("alice"));
    let mut kinds = BTreeSet::new();
    for kind in Change::KINDS {
        let change = one_of(kind, "alice");
        assert_eq!(change.kind(), kind);
        kinds.insert(kind);
        // An action that the schema does not have is denied.
        let answer = decide(&ChangeGate::shipped(), &owner, &alice, &shown(&[FactorKind::Totp]), vec![change]);
        // A recovery goes past every gate, and through none.
        let is_gated = kind != "recover";
        assert_eq!(answer == Answer::Permit, is_gated, "{kind}: {answer:?}");
        assert_eq!(gate::schema_text().contains(&format!("\"{kind}\"")), is_gated, "{kind}");
    }
    assert_eq!(kinds.len(), Change::KINDS.len());
}

#[test]
fn docs_gate_md_shows_every_rule_of_the_shipped_gate_as_it_is() {
    let (rules, _) = gate::read_file("shipped", gate::shipped_text());
    assert!(rules.len() >= 9);
    for rule in rules {
        assert!(DOCUMENT.contains(&*rule.text), "docs/gate.md does not show `{}` as it is:\n{}", rule.id, rule.text);
    }
}

/// PROVES (nobody-unproven)
#[test]
fn nobody_is_let_through_who_has_shown_nothing_whatever_the_policies_say() {
    let state = mesh(&[("alice", "owner", false)]);
    let open = own("@id(\"open\") permit (principal, action, resource);");
    let alice = Author::Operator(name("alice"));
    let add = |whose: &str| Change::AddFactor {
        operator: name(whose),
        id: FactorId::parse("new").unwrap(),
        factor: EnrolledFactor::Totp,
    };
    let policy = || one_of("remove_policy", "alice");
    for (case, kinds, changes, expected) in [
        ("nothing", &[][..], vec![policy()], "step-up mfa"),
        ("a code", &[FactorKind::Totp], vec![policy()], "permit"),
        ("a recovery code", &[FactorKind::Recovery], vec![policy()], "step-up mfa"),
        ("a recovery code for a factor of one's own", &[FactorKind::Recovery], vec![add("alice")], "permit"),
        ("a recovery code for one of another", &[FactorKind::Recovery], vec![add("bob")], "step-up mfa"),
        ("a recovery code for both", &[FactorKind::Recovery], vec![add("alice"), policy()], "step-up mfa"),
    ] {
        let state = match case {
            "a recovery code for one of another" => mesh(&[("alice", "owner", false), ("bob", "owner", false)]),
            _ => state.clone(),
        };
        assert_eq!(cell(&decide(&open, &state, &alice, &shown(kinds), changes)), expected, "{case}");
    }
}

/// PROVES (no-act-unproven)
#[test]
fn nobody_reads_or_invites_who_is_no_operator_or_has_shown_nothing_whatever_the_policies_say() {
    let state = mesh(&[("alice", "owner", false), ("eve", "guest", true)]);
    let open = own("@id(\"open\") permit (principal, action, resource);");
    let two = own("@id(\"open\") permit (principal, action, resource);
        @id(\"two\") @countersign(\"1\") forbid (principal, action, resource);");
    let shipped = ChangeGate::shipped();
    let (nothing, code, key) = (&[][..], &[FactorKind::Totp][..], &[FactorKind::Roaming][..]);
    for (case, gate, who, act, kinds, signed_in, expected) in [
        ("nothing", &open, "alice", Act::ReadLedger, nothing, false, "step-up mfa"),
        ("signed in", &open, "alice", Act::ReadLedger, nothing, true, "permit"),
        ("a code", &open, "alice", Act::InviteHost, code, false, "permit"),
        ("a recovery code", &open, "alice", Act::ReadDecisions, &[FactorKind::Recovery], false, "step-up mfa"),
        ("nobody", &open, "zoe", Act::ReadLedger, key, true, "deny"),
        ("what nobody can countersign", &two, "alice", Act::ReadLedger, key, true, "deny"),
        ("a role that is nothing here reads", &shipped, "eve", Act::ReadLedger, nothing, true, "permit"),
        ("and shows the key that they have", &shipped, "eve", Act::ReadDecisions, code, true, "step-up phr"),
        ("", &shipped, "eve", Act::ReadDecisions, key, true, "permit"),
        ("and lets no host in", &shipped, "eve", Act::InviteHost, key, true, "deny"),
        ("being signed in meets no obligation", &shipped, "alice", Act::ExportLedger, nothing, true, "step-up mfa"),
    ] {
        let answer = decide_act(gate, &state, &Author::Operator(name(who)), act, &shown(kinds), signed_in);
        assert_eq!(cell(&answer), expected, "{case}");
    }
    let late = AskedTo {
        author: &Author::Operator(name("alice")),
        act: Act::ReadDecisions,
        state: &state,
        assurance: &shown(code),
        signed_in: true,
        origin: Origin::Socket,
        risk: 0,
        now_seconds: NOW + 901,
    };
    assert_eq!(cell(&shipped.decide_act(&late)), "step-up mfa", "a quarter of an hour later");
    assert_eq!(shipped.decide_act(&AskedTo { now_seconds: NOW + 900, ..late }), Answer::Permit);
}

/// PROVES (bots-not-exempt)
#[test]
fn a_pipeline_is_let_through_by_nobody_alone_and_never_widens_itself() {
    let mut state = mesh(&[("alice", "owner", false), ("bob", "owner", false)]);
    state.pipelines.insert("root".into(), pipeline(&["owner"]));
    let open = own("@id(\"open\") permit (principal, action, resource);");
    let two = own("@id(\"open\") permit (principal, action, resource);
        @id(\"two\") @countersign(\"2\") forbid (principal in Role::\"owner\", action, resource);");
    let nothing = Assurance::default();
    for (case, gate, who, kind, approvals, expected) in [
        ("an open gate", &open, "deploy", "set_policy", &[][..], "countersign 1"),
        ("and somebody", &open, "deploy", "set_policy", &["bob"], "permit"),
        ("its roles are those that the mesh gives", &two, "root", "set_policy", &["bob"], "countersign 2"),
        ("a name without them", &two, "deploy", "set_policy", &["bob"], "permit"),
        ("the shipped gate", &ChangeGate::shipped(), "deploy", "set_policy", &["bob"], "permit"),
        ("itself", &ChangeGate::shipped(), "root", "set_pipeline", &["alice", "bob"], "deny"),
        ("whom to believe", &ChangeGate::shipped(), "root", "set_issuer", &["alice", "bob"], "deny"),
        ("who signs in", &ChangeGate::shipped(), "root", "set_sign_in", &["alice", "bob"], "deny"),
        ("the gate", &ChangeGate::shipped(), "root", "set_gate_policy", &["alice", "bob"], "deny"),
        ("operators", &ChangeGate::shipped(), "root", "set_operator_roles", &["alice", "bob"], "deny"),
        ("factors", &ChangeGate::shipped(), "root", "remove_factor", &["alice", "bob"], "deny"),
        ("the seal", &ChangeGate::shipped(), "root", "seal_settings", &["alice", "bob"], "deny"),
    ] {
        let answer = decide_with(gate, &state, &proposer(who), &nothing, vec![one_of(kind, "")], approvals);
        assert_eq!(cell(&answer), expected, "{case}");
    }
}

/// PROVES (no-word-for-a-factor)
#[test]
fn whom_a_provider_vouches_for_changes_nothing_alone_and_one_operator_more_stands_in_for_their_factor() {
    let state = with_people(mesh(&[("alice", "owner", true), ("bob", "owner", false), ("eve", "owner", false)]));
    let open = own("@id(\"open\") permit (principal, action, resource);");
    let strict = own("@id(\"open\") permit (principal, action, resource);
        @id(\"key\") @step_up(\"phr\") @max_age(\"60\") forbid (principal, action, resource);
        @id(\"two\") @countersign(\"1\") forbid (principal, action == Action::\"set_route\", resource);");
    let shipped = ChangeGate::shipped();
    let nothing = Assurance::default();
    for (case, gate, group, kind, approvals, expected) in [
        ("an open gate", &open, "staff", "set_policy", &[][..], "countersign 1"),
        ("and somebody", &open, "staff", "set_policy", &["bob"], "permit"),
        ("in no group", &open, "others", "set_policy", &["alice", "bob"], "deny"),
        ("a factor that they do not have", &strict, "staff", "set_policy", &[], "countersign 1"),
        ("and somebody who has one", &strict, "staff", "set_policy", &["bob"], "permit"),
        ("one more than the gate asks for", &strict, "staff", "set_route", &["bob"], "countersign 2"),
        ("and those two", &strict, "staff", "set_route", &["alice", "bob"], "permit"),
        ("the shipped gate", &shipped, "staff", "set_policy", &[], "countersign 1"),
        ("and somebody behind it", &shipped, "staff", "set_policy", &["bob"], "permit"),
        ("what editors do not change", &shipped, "staff", "set_sign_in", &["alice", "bob"], "deny"),
        ("what owners change", &shipped, "admins", "set_sign_in", &[], "countersign 1"),
    ] {
        let answer = decide_with(gate, &state, &person(group), &nothing, vec![one_of(kind, "")], approvals);
        assert_eq!(cell(&answer), expected, "{case}");
    }
    // A factor that somebody else showed is none of theirs.
    let shown = shown(&[FactorKind::Roaming]);
    let answer = decide(&strict, &state, &person("staff"), &shown, vec![one_of("set_policy", "")]);
    assert_eq!(cell(&answer), "countersign 1");
    let reading = own("@id(\"open\") permit (principal, action, resource);
        @id(\"key\") @step_up(\"phr\") forbid (principal, action in Action::\"reading\", resource);");
    for (case, gate, group, act, signed_in, expected) in [
        ("the ledger", &shipped, "staff", Act::ReadLedger, true, "permit"),
        ("where it takes a factor", &reading, "staff", Act::ReadLedger, true, "deny"),
        ("in no group", &shipped, "others", Act::ReadLedger, true, "deny"),
        ("not signed in", &shipped, "staff", Act::ReadLedger, false, "deny"),
        ("decisions", &open, "admins", Act::ReadDecisions, true, "deny"),
        ("all of the ledger", &open, "admins", Act::ExportLedger, true, "deny"),
        ("a host", &open, "admins", Act::InviteHost, true, "deny"),
    ] {
        let answer = decide_act(gate, &state, &person(group), act, &shown, signed_in);
        assert_eq!(cell(&answer), expected, "{case}");
    }
}

#[test]
fn a_recovery_code_opens_the_way_to_a_new_factor_of_ones_own_in_the_shipped_gate_too() {
    let alice = Author::Operator(name("alice"));
    let recovery = shown(&[FactorKind::Recovery]);
    for has_key in [false, true] {
        let state = mesh(&[("alice", "editor", has_key), ("bob", "owner", false)]);
        let own = Change::AddFactor {
            operator: name("alice"),
            id: FactorId::parse("new").unwrap(),
            factor: EnrolledFactor::Totp,
        };
        let gate = ChangeGate::shipped();
        assert_eq!(decide(&gate, &state, &alice, &recovery, vec![own]), Answer::Permit);
        let other = decide(&gate, &state, &alice, &recovery, vec![one_of("remove_policy", "alice")]);
        assert!(matches!(other, Answer::StepUp(_)), "{other:?}");
    }
}

#[test]
fn obligations_of_all_changes_merge_to_the_strictest_and_only_what_is_missing_is_asked() {
    let state = mesh(&[("alice", "owner", true), ("bob", "owner", false), ("carol", "owner", false)]);
    let gate = own("@id(\"all\") permit (principal, action, resource);
        @id(\"a\") @step_up(\"mfa\") @max_age(\"60\") forbid (principal, action in Action::\"policies\", resource);
        @id(\"b\") @step_up(\"phr\") forbid (principal, action in Action::\"traffic\", resource);
        @id(\"c\") @countersign(\"1\") forbid (principal, action in Action::\"roles\", resource);
        @id(\"d\") @countersign(\"2\") forbid (principal, action in Action::\"seal\", resource);
        @id(\"e\") forbid (principal, action == Action::\"remove_service\", resource);");
    let alice = Author::Operator(name("alice"));
    let (policy, route, role, seal) =
        (one_of("set_policy", ""), one_of("set_route", ""), one_of("set_role", ""), one_of("seal_settings", ""));
    let gone = one_of("remove_service", "");
    let requires = |factor, max_age_seconds, countersign| Requires { factor, max_age_seconds, countersign };
    let (code, key) = (&[FactorKind::Totp][..], &[FactorKind::Roaming][..]);
    for (case, kinds, approvals, changes, expected) in [
        ("one", &[][..], &[][..], vec![&policy], Answer::StepUp(requires(Some(Factor::Mfa), Some(60), 0))),
        ("two", &[], &[], vec![&policy, &route], Answer::StepUp(requires(Some(Factor::Phr), Some(60), 0))),
        ("one of them met", code, &[], vec![&policy, &route], Answer::StepUp(requires(Some(Factor::Phr), None, 0))),
        ("both met", key, &[], vec![&policy, &route], Answer::Permit),
        ("others too", &[], &[], vec![&policy, &role], Answer::StepUp(requires(Some(Factor::Mfa), Some(60), 1))),
        ("only others", code, &[], vec![&policy, &role], Answer::NeedsCountersign(requires(None, None, 1))),
        ("most of them", code, &["bob"], vec![&role, &seal], Answer::NeedsCountersign(requires(None, None, 2))),
        ("all of them", code, &["bob", "carol"], vec![&role, &seal], Answer::Permit),
        ("one's own", code, &["alice"], vec![&role], Answer::NeedsCountersign(requires(None, None, 1))),
        (
            "one's own among them",
            code,
            &["alice", "bob"],
            vec![&seal],
            Answer::NeedsCountersign(requires(None, None, 2)),
        ),
        (
            "beside what nothing lifts",
            key,
            &["bob", "carol"],
            vec![&policy, &gone],
            Answer::Deny(vec!["service web: forbidden by e".into()]),
        ),
    ] {
        let changes = changes.into_iter().cloned().collect();
        let answer = decide_with(&gate, &state, &alice, &shown(kinds), changes, approvals);
        assert_eq!(answer, expected, "{case}");
    }
}

#[test]
fn an_operator_at_risk_is_asked_for_more_and_of_others_there_is_no_risk() {
    let mut state = mesh(&[("alice", "owner", false), ("bob", "owner", false)]);
    state.pipelines.insert("root".into(), pipeline(&["owner"]));
    let gate = own("@id(\"all\") permit (principal, action, resource);
        @id(\"warned\") @countersign(\"1\") forbid (principal, action, resource) when { context has risk.operator && context.risk.operator >= 40 };
        @id(\"worse\") forbid (principal, action, resource) when { context has risk.operator && context.risk.operator >= 80 };");
    let (alice, root) = (Author::Operator(name("alice")), proposer("root"));
    let (code, nothing) = (shown(&[FactorKind::Totp]), Assurance::default());
    for (who, shows, risk, approvals, expected) in [
        (&alice, &code, 39, &[][..], "permit"),
        (&alice, &code, 40, &[], "countersign 1"),
        (&alice, &code, 40, &["bob"], "permit"),
        (&alice, &code, 80, &["bob"], "deny"),
        (&root, &nothing, 100, &["bob"], "permit"),
    ] {
        let answer = decide_at_risk(&gate, &state, who, shows, vec![one_of("set_policy", "")], approvals, risk);
        assert_eq!(cell(&answer), expected, "{who} at {risk}");
    }
    let act = |risk| {
        let asked = AskedTo {
            author: &alice,
            act: Act::ReadDecisions,
            state: &state,
            assurance: &code,
            signed_in: true,
            origin: Origin::Socket,
            risk,
            now_seconds: NOW,
        };
        cell(&gate.decide_act(&asked))
    };
    assert_eq!([act(39), act(40), act(80)], ["permit", "deny", "deny"], "an act has nobody to stand behind it");
}

#[test]
fn the_gate_of_docs_gate_md_for_an_operator_at_risk_holds_beside_the_shipped_one() {
    let from = DOCUMENT.find("@id(\"an-operator-at-risk-is-countersigned\")").expect("docs/gate.md shows it");
    let rule = DOCUMENT[from..].split("```").next().unwrap();
    let gate = own(&format!("{}\n{rule}", gate::shipped_text()));
    let state = mesh(&[("alice", "owner", false), ("bob", "owner", false)]);
    let (alice, code) = (Author::Operator(name("alice")), shown(&[FactorKind::Totp]));
    for (risk, expected) in [(24, "permit"), (25, "countersign 1")] {
        let answer = decide_at_risk(&gate, &state, &alice, &code, vec![one_of("set_policy", "")], &[], risk);
        assert_eq!(cell(&answer), expected, "at {risk}");
    }
}

#[test]
fn nobody_hopeless_is_challenged_and_what_faults_denies() {
    let state = mesh(&[("alice", "owner", false), ("bob", "guest", false)]);
    let (alice, bob) = (Author::Operator(name("alice")), Author::Operator(name("bob")));
    let stepped = "@id(\"owners\") permit (principal in Role::\"owner\", action, resource);
        @id(\"fresh\") @step_up(\"mfa\") forbid (principal, action, resource);";
    let nothing = Assurance::default();
    let policy = || vec![one_of("remove_policy", "")];
    assert_eq!(cell(&decide(&own(stepped), &state, &alice, &nothing, policy())), "step-up mfa");
    expect![[r#"Deny(["policy any: no policy of the gate permits `bob` to remove_policy"])"#]]
        .assert_eq(&format!("{:?}", decide(&own(stepped), &state, &bob, &nothing, policy())));
    let overflows = format!(
        "{stepped} @id(\"faults\") permit (principal, action, resource) when {{ context.time.hour * 9223372036854775807 * 3 > 0 }};"
    );
    let answer = decide(&own(&overflows), &state, &alice, &shown(&[FactorKind::Totp]), policy());
    assert!(matches!(&answer, Answer::Deny(why) if why[0].contains("cannot be evaluated")), "{answer:?}");
}

#[test]
fn moving_a_service_asks_the_gate_as_it_is_and_as_it_will_be() {
    let state = mesh(&[("alice", "shop-team", false), ("bob", "pay-team", false)]);
    let gate = own("@id(\"shop\") permit (principal in Role::\"shop-team\", action, resource in Namespace::\"shop\");
        @id(\"pay\") permit (principal in Role::\"pay-team\", action, resource in Namespace::\"payments\");");
    let declare = |service_name: &str, namespace: &str| Change::DeclareService {
        name: service(service_name),
        spec: spec(Some(namespace)),
    };
    let code = shown(&[FactorKind::Totp]);
    for (case, who, change, expected) in [
        ("a service of theirs", "bob", declare("pay", "payments"), "permit"),
        ("one that another team has, into theirs", "alice", declare("pay", "shop"), "deny"),
        ("one of theirs into another team's", "bob", declare("pay", "shop"), "deny"),
        ("a new one", "alice", declare("new", "shop"), "permit"),
        ("a new one of another team", "alice", declare("new", "payments"), "deny"),
    ] {
        let author = Author::Operator(name(who));
        assert_eq!(cell(&decide(&gate, &state, &author, &code, vec![change])), expected, "{case}");
    }
}

#[test]
fn a_gate_that_nobody_could_change_again_is_seen() {
    let codes = mesh(&[("alice", "owner", false), ("bob", "editor", false)]);
    let keys = mesh(&[("alice", "owner", true)]);
    let all = "@id(\"all\") permit (principal, action, resource);";
    for (case, text, state, expected) in [
        ("nothing", "", &codes, true), // The shipped one.
        ("everything", all, &codes, true),
        (
            "only services",
            "@id(\"s\") permit (principal, action in Action::\"registrations\", resource);",
            &codes,
            false,
        ),
        ("a role that nobody has", "@id(\"s\") permit (principal in Role::\"root\", action, resource);", &codes, false),
        (
            "keys that nobody has",
            &format!("{all} @id(\"k\") @step_up(\"phr\") forbid (principal, action, resource);"),
            &codes,
            false,
        ),
        ("keys", &format!("{all} @id(\"k\") @step_up(\"phr\") forbid (principal, action, resource);"), &keys, true),
        (
            "two others of one",
            &format!("{all} @id(\"k\") @countersign(\"2\") forbid (principal, action, resource);"),
            &codes,
            false,
        ),
        (
            "one other of one",
            &format!("{all} @id(\"k\") @countersign(\"1\") forbid (principal, action, resource);"),
            &codes,
            true,
        ),
    ] {
        let gate = if text.is_empty() { ChangeGate::shipped() } else { own(text) };
        assert_eq!(gate.is_mendable(state, NOW), expected, "{case}");
    }
}

#[test]
fn what_a_gate_policy_gets_wrong_is_told() {
    for (text, expected) in [
        ("permit (principal, action, resource);", "the policy has no @id"),
        ("@id(\"a\") @countersign(\"1\") permit (principal, action, resource);", "@countersign stands on a permit"),
        ("@id(\"a\") @countersign(\"0\") forbid (principal, action, resource);", "`0` is not a number of operators"),
        ("@id(\"a\") @step_up(\"sms\") forbid (principal, action, resource);", "`sms` is not a factor"),
        ("@id(\"a\") permit (principal is Workload, action, resource);", "Workload"),
        ("@id(\"a\") permit (principal, action == Action::\"http:GET\", resource);", "http:GET"),
        ("@id(\"a\") permit (principal, action, resource) when { context.assurance.ages.totp < 60 };", "totp"),
    ] {
        let (_, mistakes) = gate::read_file("gate/a.cedar", text);
        assert!(mistakes.iter().any(|mistake| mistake.what.contains(expected)), "{text}: {mistakes:?}");
    }
}
