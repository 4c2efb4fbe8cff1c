//! A protected mesh through the socket: who enrols, what a code is good for, what waits and what becomes of it.

mod support;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use countersign_api::local::{
    Applied, Apply, ApplyAs, Checked, ClearSignalsAs, Code, Confirm, Enrol, Enrolled, Enrolment, GateOutcome,
    IdentityFilter, Invitation, Invite, InviteAs, Mesh, OPERATOR_HEADER, Opened, Problem, Proposal, ProposalDetail,
    ProposalState, RevokeAs, Revoked, RiskView, Shown, SignalSent,
};
use countersign_api::mesh::follow_event::Event;
use countersign_control::{clock::Clock, mfa, start_with_clock};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Revision},
    directory::quarantined,
    identity::{FactorId, OperatorName},
    operator::EnrolledFactor,
    policy::Factor,
    service::{Protocol, ServiceSpec},
    signal::statement::{Kind, Subject},
};
use countersign_testkit::authenticator::App;
use support::{Plane, config, declare, name, trust_domain};

fn operator(given: &str) -> OperatorName {
    OperatorName::parse(given).unwrap()
}

/// A control plane whose time is ours.
struct Clocked {
    plane: Plane,
    now_ms: Arc<AtomicU64>,
}

impl Clocked {
    async fn start() -> Self {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        let now_ms = Arc::new(AtomicU64::new(now_ms));
        let dir = tempfile::tempdir().unwrap();
        let told = now_ms.clone();
        let clock = Clock::from_fn(move || told.load(Ordering::Relaxed));
        let control = start_with_clock(config(dir.path().into()), clock).await.unwrap();
        Self { plane: Plane { control, dir }, now_ms }
    }

    async fn restart(self) -> Self {
        let Self { plane: Plane { control, dir }, now_ms } = self;
        control.stop().await;
        let told = now_ms.clone();
        let clock = Clock::from_fn(move || told.load(Ordering::Relaxed));
        let control = start_with_clock(config(dir.path().into()), clock).await.unwrap();
        Self { plane: Plane { control, dir }, now_ms }
    }

    fn now(&self) -> u64 {
        self.now_ms.load(Ordering::Relaxed)
    }

    fn pass(&self, seconds: u64) {
        self.now_ms.fetch_add(seconds * 1000, Ordering::Relaxed);
    }

    async fn begin(&self, who: &str, invitation: Option<String>) -> Result<Enrolment, Problem> {
        let asked = Enrol { operator: operator(who), invitation: invitation.map(Code), shown: Shown::default() };
        self.plane.post("/v1/enrolments", &asked).await
    }

    async fn confirm(&self, enrolment: &Enrolment, code: String) -> Result<Enrolled, Problem> {
        self.plane.post(&format!("/v1/enrolments/{}", enrolment.id), &Confirm { code: Code(code) }).await
    }

    /// Enrols, and lets the time of the code that did it pass.
    async fn enrol(&self, who: &str, invitation: Option<String>) -> (App, Enrolled) {
        let enrolment = self.begin(who, invitation).await.unwrap();
        let app = app_of(&enrolment);
        let enrolled = self.confirm(&enrolment, app.code(self.now() / 1000)).await.unwrap();
        self.pass(60);
        (app, enrolled)
    }

    /// A mesh with two services whose owner is alice.
    async fn protected() -> (Self, App, Enrolled) {
        let mesh = Self::start().await;
        mesh.plane.create(&["web", "catalog"]).await;
        let (alice, enrolled) = mesh.enrol("alice", None).await;
        (mesh, alice, enrolled)
    }

    /// Invites somebody with these roles, as alice, and enrols them.
    async fn another(&self, alice: &App, who: &str, role: &str) -> App {
        let invite = Change::InviteOperator { name: operator(who), roles: [role.into()].into() };
        let applied = self.apply(vec![invite], &self.shown(alice)).await.unwrap();
        let token = applied.invitations[0].token.clone();
        let (app, _) = self.enrol(who, Some(token)).await;
        app
    }

    /// What `app` shows for the next question: a code that was not used yet.
    fn shown(&self, app: &App) -> Shown {
        self.pass(60);
        let code = Code(app.code(self.now() / 1000));
        Shown { operator: Some(operator(&app.account)), otp: Some(code), recovery_code: None, countersignature: None }
    }

    async fn mesh(&self) -> Mesh {
        self.plane.get("/v1/mesh").await
    }

    async fn apply(&self, changes: Vec<Change>, shown: &Shown) -> Result<Applied, Problem> {
        self.apply_with(changes, Bodies::default(), shown).await
    }

    async fn apply_with(&self, changes: Vec<Change>, bodies: Bodies, shown: &Shown) -> Result<Applied, Problem> {
        let mesh = self.mesh().await;
        let changes = quarantined(changes, &mesh.state);
        self.exactly(Apply { change_set: ChangeSet { base: mesh.revision, changes }, bodies }, shown).await
    }

    async fn exactly(&self, apply: Apply, shown: &Shown) -> Result<Applied, Problem> {
        self.plane.post("/v1/changes", &ApplyAs { apply, shown: shown.clone() }).await
    }

    /// A gate of these policies, in place of the shipped one, before anybody enrols.
    async fn put_up(&self, gate: &str) {
        let (policies, mistakes) = countersign_core::gate::read_file("gate/own.cedar", gate);
        assert!(mistakes.is_empty(), "{mistakes:?}");
        let mut bodies = Bodies::default();
        let changes = policies
            .into_iter()
            .map(|policy| Change::SetGatePolicy {
                id: policy.id,
                file: "gate/own.cedar".into(),
                body: bodies.insert(policy.text),
            })
            .collect();
        self.apply_with(changes, bodies, &Shown::default()).await.unwrap();
    }

    async fn answer(&self, id: &str, verb: &str, shown: &Shown) -> Result<Proposal, Problem> {
        self.plane.post(&format!("/v1/proposals/{id}/{verb}"), shown).await
    }
}

fn app_of(enrolment: &Enrolment) -> App {
    App::read(enrolment.operator.as_str(), &enrolment.otpauth)
}

fn named(who: &str) -> Shown {
    Shown { operator: Some(operator(who)), ..Shown::default() }
}

fn outcome(problem: &Problem) -> GateOutcome {
    problem.refusal.as_ref().unwrap_or_else(|| panic!("{problem:?}")).outcome
}

fn waits(problem: &Problem) -> String {
    problem.refusal.as_ref().and_then(|refusal| refusal.change.clone()).unwrap_or_else(|| panic!("{problem:?}"))
}

const TWO_OF_US: &str = "@id(\"all\") permit (principal, action, resource);
    @id(\"code\") @step_up(\"mfa\") @max_age(\"300\") forbid (principal, action, resource);
    @id(\"two\") @countersign(\"1\") forbid (principal, action in Action::\"registrations\", resource);";

#[tokio::test]
async fn whoever_enrols_first_owns_the_mesh_and_from_then_on_nothing_passes_without_a_factor() {
    let mesh = Clocked::start().await;
    assert_eq!(mesh.begin("alice", None).await.unwrap_err().status, 409, "there is no mesh yet");
    mesh.plane.create(&["web"]).await;
    let before = mesh.plane.status().await;
    assert!(!before.protected && before.warnings.iter().any(|warning| warning.contains("unprotected")));

    let (_, enrolled) = mesh.enrol("alice", None).await;
    assert!(enrolled.anchor);
    let codes: BTreeSet<_> = enrolled.recovery_codes.iter().collect();
    assert_eq!(codes.len(), mfa::RECOVERY_CODES);
    let state = mesh.mesh().await.state;
    let alice = &state.operators[&operator("alice")];
    assert_eq!(alice.roles, ["owner".into()].into());
    assert_eq!(alice.factors[&enrolled.factor], EnrolledFactor::Totp);

    let after = mesh.plane.status().await;
    assert!(after.protected && !after.warnings.iter().any(|warning| warning.contains("unprotected")), "{after:?}");
    let refused = mesh.apply(vec![declare("more")], &Shown::default()).await.unwrap_err();
    assert_eq!((refused.status, outcome(&refused)), (403, GateOutcome::StepUp));
    let requires = refused.refusal.unwrap().requires.unwrap();
    assert_eq!((requires.factor, requires.max_age_seconds, requires.countersign), (Some(Factor::Mfa), Some(300), 0));
    assert_eq!(mesh.begin("mallory", None).await.unwrap_err().status, 403, "nobody else enrols without being invited");

    let mesh = mesh.restart().await;
    assert!(mesh.plane.status().await.protected, "also after a restart");
    let refused = mesh.apply(vec![declare("more")], &Shown::default()).await.unwrap_err();
    assert_eq!(outcome(&refused), GateOutcome::StepUp);
}

/// PROVES (gated)
#[tokio::test]
async fn only_what_the_gate_permits_to_who_has_proven_it_becomes_an_entry() {
    let (mesh, alice, _) = Clocked::protected().await;
    let bob = mesh.another(&alice, "bob", "deployer").await;
    let at = mesh.mesh().await.revision;
    for (case, changes, shown, expected) in [
        ("nothing shown", vec![declare("a")], named("alice"), GateOutcome::StepUp),
        (
            "somebody else's code",
            vec![declare("a")],
            Shown { operator: Some(operator("alice")), ..mesh.shown(&bob) },
            GateOutcome::StepUp,
        ),
        ("nobody", vec![declare("a")], named("mallory"), GateOutcome::Denied),
        ("what they may not", vec![declare("a")], mesh.shown(&bob), GateOutcome::Denied),
        (
            "roles of their own",
            vec![Change::SetOperatorRoles { name: operator("bob"), roles: ["owner".into()].into() }],
            mesh.shown(&bob),
            GateOutcome::Denied,
        ),
    ] {
        let refused = mesh.apply(changes, &shown).await.unwrap_err();
        assert_eq!(outcome(&refused), expected, "{case}: {refused:?}");
        assert_eq!(mesh.mesh().await.revision, at, "{case}");
    }
    // What was denied used no code up.
    let shown = mesh.shown(&bob);
    assert_eq!(outcome(&mesh.apply(vec![declare("a")], &shown).await.unwrap_err()), GateOutcome::Denied);
    let deploy =
        Change::Deploy { service: name("web"), artifacts: [countersign_core::canonical::Digest::of(b"web")].into() };
    mesh.apply(vec![deploy], &shown).await.unwrap();
    let applied = mesh.apply(vec![declare("a")], &mesh.shown(&alice)).await.unwrap();
    let change: countersign_api::local::ChangeDetail =
        mesh.plane.get(&format!("/v1/changes/{}", applied.revision)).await;
    assert_eq!(change.summary.actor, "alice");

    // A factor comes in by an enrolment only, whoever asks.
    let factor = Change::AddFactor {
        operator: operator("alice"),
        id: FactorId::parse("x").unwrap(),
        factor: EnrolledFactor::Totp,
    };
    assert_eq!(mesh.apply(vec![factor], &mesh.shown(&alice)).await.unwrap_err().status, 422);
}

/// PROVES (code-once)
#[tokio::test]
async fn a_code_is_good_once_also_after_a_restart_and_guessing_is_throttled_also_after_one() {
    let (mesh, alice, _) = Clocked::protected().await;
    let code = alice.code(mesh.now() / 1000);
    let shown = Shown { operator: None, otp: Some(Code(code)), recovery_code: None, countersignature: None };
    mesh.apply(vec![declare("a")], &shown).await.unwrap();
    let again = mesh.apply(vec![declare("b")], &shown).await.unwrap_err();
    assert!(again.title.contains("used already"), "{again:?}");
    assert_eq!(outcome(&again), GateOutcome::StepUp);
    let mesh = mesh.restart().await;
    let again = mesh.apply(vec![declare("b")], &shown).await.unwrap_err();
    assert!(again.title.contains("used already"), "{again:?}");

    mesh.pass(16 * 60);
    let wrong = |mesh: &Clocked| {
        let right = alice.code(mesh.now() / 1000);
        let wrong = format!("{}{}", if right.starts_with('0') { '1' } else { '0' }, &right[1..]);
        Shown { operator: None, otp: Some(Code(wrong)), recovery_code: None, countersignature: None }
    };
    for n in 0..mfa::GUESSES_MAX {
        let refused = mesh.apply(vec![declare("b")], &wrong(&mesh)).await.unwrap_err();
        assert!(refused.title.contains("wrong"), "{n}: {refused:?}");
    }
    let right = Shown {
        operator: None,
        otp: Some(Code(alice.code(mesh.now() / 1000))),
        recovery_code: None,
        countersignature: None,
    };
    let throttled = mesh.apply(vec![declare("b")], &right).await.unwrap_err();
    assert_eq!(throttled.status, 429, "the right one is not looked at either: {throttled:?}");
    let mesh = mesh.restart().await;
    assert_eq!(mesh.apply(vec![declare("b")], &right).await.unwrap_err().status, 429, "a restart forgets no guess");
    mesh.pass(15 * 60 + 1);
    mesh.apply(vec![declare("b")], &mesh.shown(&alice)).await.unwrap();
}

#[tokio::test]
async fn the_secrets_of_factors_are_sealed_and_nowhere_in_the_ledger() {
    let (mesh, alice, enrolled) = Clocked::protected().await;
    let dir = mesh.plane.dir.path().to_owned();
    let mut everything = Vec::new();
    for file in ["control.db", "control.db-wal"] {
        everything.extend(std::fs::read(dir.join(file)).unwrap_or_default());
    }
    let holds = |needle: &[u8]| everything.windows(needle.len()).any(|window| window == needle);
    assert!(holds(b"alice"), "we look where things are");
    assert!(!holds(&alice.secret));
    for code in &enrolled.recovery_codes {
        assert!(!holds(code.as_bytes()) && !holds(code.replace('-', "").as_bytes()));
    }
}

#[tokio::test]
async fn a_recovery_code_is_good_once_for_a_new_factor_and_for_nothing_else() {
    let (mesh, _, enrolled) = Clocked::protected().await;
    let [first, second, ..] = &enrolled.recovery_codes[..] else { panic!("two codes") };
    let with = |code: &str| Shown {
        operator: Some(operator("alice")),
        otp: None,
        recovery_code: Some(Code(code.into())),
        countersignature: None,
    };
    let refused = mesh.apply(vec![declare("a")], &with(first)).await.unwrap_err();
    assert_eq!(outcome(&refused), GateOutcome::StepUp, "it opens no change: {refused:?}");

    let begin = |shown: Shown| {
        let asked = Enrol { operator: operator("alice"), invitation: None, shown };
        let plane = &mesh.plane;
        async move { plane.post::<Enrolment>("/v1/enrolments", &asked).await }
    };
    assert_eq!(begin(with(first)).await.unwrap_err().status, 403, "it was used up by that");
    assert_eq!(begin(with("1111-2222-3333-4444-5555")).await.unwrap_err().status, 403);
    let enrolment = begin(with(&second.to_uppercase().replace('-', " "))).await.unwrap();
    let app = app_of(&enrolment);
    let added = mesh.confirm(&enrolment, app.code(mesh.now() / 1000)).await.unwrap();
    assert!(!added.anchor && added.recovery_codes.is_empty(), "the others are still good");
    assert_eq!(begin(with(second)).await.unwrap_err().status, 403);
    mesh.pass(60);
    mesh.apply(vec![declare("a")], &mesh.shown(&app)).await.unwrap();
    // The lost one goes.
    let lost = Change::RemoveFactor { operator: operator("alice"), id: enrolled.factor };
    mesh.apply(vec![lost], &mesh.shown(&app)).await.unwrap();
}

#[tokio::test]
async fn an_invitation_is_good_once_for_whom_it_names_and_a_day() {
    let (mesh, alice, _) = Clocked::protected().await;
    let invite = |who: &str| Change::InviteOperator { name: operator(who), roles: ["editor".into()].into() };
    let applied = mesh.apply(vec![invite("bob"), invite("carol")], &mesh.shown(&alice)).await.unwrap();
    let token = |who: &str| {
        let found = applied.invitations.iter().find(|invitation| invitation.operator == operator(who));
        Some(found.unwrap().token.clone())
    };
    assert_eq!(mesh.begin("bob", None).await.unwrap_err().status, 403);
    assert_eq!(mesh.begin("bob", token("carol")).await.unwrap_err().status, 403);
    assert_eq!(mesh.begin("bob", Some("cso1.00".into())).await.unwrap_err().status, 403);
    let (first, second) =
        (mesh.begin("bob", token("bob")).await.unwrap(), mesh.begin("bob", token("bob")).await.unwrap());
    let wrong = mesh.confirm(&first, "000000".into()).await;
    assert!(wrong.is_err() || app_of(&first).code(mesh.now() / 1000) == "000000");
    mesh.confirm(&second, app_of(&second).code(mesh.now() / 1000)).await.unwrap();
    assert_eq!(
        mesh.confirm(&first, app_of(&first).code(mesh.now() / 1000)).await.unwrap_err().status,
        403,
        "it is used up"
    );
    mesh.pass(24 * 60 * 60 + 1);
    assert_eq!(mesh.begin("carol", token("carol")).await.unwrap_err().status, 403, "its day is over");
}

#[tokio::test]
async fn the_last_owner_and_an_operators_last_factor_stay_and_a_gate_that_locks_out_is_refused() {
    let (mesh, alice, enrolled) = Clocked::protected().await;
    mesh.another(&alice, "bob", "editor").await;
    let bobs = mesh.mesh().await.state.operators[&operator("bob")].factors.keys().next_back().unwrap().clone();
    let mut bodies = Bodies::default();
    let body = bodies.insert("@id(\"nobody\") permit (principal in Role::\"root\", action, resource);");
    let locked = Change::SetGatePolicy { id: "nobody".into(), file: "gate/nobody.cedar".into(), body };
    let broken = Bodies::default();
    for (case, change, bodies, part) in [
        ("the owner", Change::RemoveOperator { name: operator("alice") }, &broken, "the last owner stays"),
        (
            "the owner's role",
            Change::SetOperatorRoles { name: operator("alice"), roles: ["editor".into()].into() },
            &broken,
            "the last owner stays",
        ),
        (
            "the owner's factor",
            Change::RemoveFactor { operator: operator("alice"), id: enrolled.factor.clone() },
            &broken,
            "without a factor",
        ),
        ("bob's factor", Change::RemoveFactor { operator: operator("bob"), id: bobs }, &broken, "without a factor"),
        ("a gate of nobody", locked, &bodies, "the last owner stays"),
    ] {
        let refused = mesh.apply_with(vec![change], bodies.clone(), &mesh.shown(&alice)).await.unwrap_err();
        assert_eq!(refused.status, 422, "{case}: {refused:?}");
        assert!(refused.detail.as_ref().unwrap().contains(part), "{case}: {refused:?}");
    }
    let mut bodies = Bodies::default();
    let body = bodies.insert("@id(\"x\") permit (principal, action, resource) when { context.nothing };");
    let broken = Change::SetGatePolicy { id: "x".into(), file: "gate/x.cedar".into(), body };
    let refused = mesh.apply_with(vec![broken], bodies, &mesh.shown(&alice)).await.unwrap_err();
    assert!(refused.detail.unwrap().contains("nothing"), "a policy that is not valid");
}

/// PROVES (not-ones-own)
#[tokio::test]
async fn a_change_that_needs_two_is_applied_by_the_second_exactly_once_and_never_by_its_author() {
    let mesh = Clocked::start().await;
    mesh.plane.create(&["web"]).await;
    mesh.put_up(TWO_OF_US).await;
    let (alice, _) = mesh.enrol("alice", None).await;
    let bob = mesh.another(&alice, "bob", "owner").await;
    let refused = mesh.apply(vec![declare("a")], &named("alice")).await.unwrap_err();
    assert_eq!(outcome(&refused), GateOutcome::StepUp, "first its author shows a factor");
    let stepping = waits(&refused);
    assert_eq!(mesh.answer(&stepping, "countersign", &mesh.shown(&bob)).await.unwrap_err().status, 409);

    let refused = mesh.apply(vec![declare("a")], &mesh.shown(&alice)).await.unwrap_err();
    assert_eq!(outcome(&refused), GateOutcome::NeedsCountersign);
    let id = waits(&refused);
    let detail: ProposalDetail = mesh.plane.get(&format!("/v1/proposals/{id}")).await;
    assert_eq!(detail.change_set.digest(), refused.refusal.as_ref().unwrap().digest.unwrap());
    for (case, shown) in [
        ("the author", mesh.shown(&alice)),
        ("nothing shown", named("bob")),
        ("the author's code", Shown { operator: Some(operator("bob")), ..mesh.shown(&alice) }),
        ("nobody", named("mallory")),
    ] {
        let refused = mesh.answer(&id, "countersign", &shown).await.unwrap_err();
        assert_eq!(refused.status, 403, "{case}: {refused:?}");
    }
    // An hour later: how old the author's code is counts up to when they asked.
    mesh.pass(60 * 60);
    let done = mesh.answer(&id, "countersign", &mesh.shown(&bob)).await.unwrap();
    let revision = mesh.mesh().await.revision;
    assert_eq!(done.state, ProposalState::Applied { revision });
    assert_eq!(mesh.answer(&id, "countersign", &mesh.shown(&bob)).await.unwrap_err().status, 410, "once");
    let change: countersign_api::local::ChangeDetail = mesh.plane.get(&format!("/v1/changes/{revision}")).await;
    assert_eq!((change.summary.actor.as_str(), change.summary.digest), ("alice", done.digest));
    let waited: Proposal = mesh.plane.get(&format!("/v1/proposals/{id}/wait?timeout_ms=0")).await;
    assert_eq!(waited, done);
}

#[tokio::test]
async fn what_waits_is_bound_to_its_base_its_author_and_its_time_and_kept_across_a_restart() {
    let (mesh, alice, _) = Clocked::protected().await;
    let refused = mesh.apply(vec![declare("a")], &named("alice")).await.unwrap_err();
    let id = waits(&refused);
    assert_eq!(
        waits(&mesh.apply(vec![declare("a")], &named("alice")).await.unwrap_err()),
        id,
        "the same is not kept twice"
    );
    let mesh = mesh.restart().await;
    let path = format!("/v1/proposals/{id}/apply");
    assert_eq!(mesh.plane.post::<Applied>(&path, &named("bob")).await.unwrap_err().status, 403);
    assert_eq!(outcome(&mesh.plane.post::<Applied>(&path, &named("alice")).await.unwrap_err()), GateOutcome::StepUp);
    let applied: Applied = mesh.plane.post(&path, &mesh.shown(&alice)).await.unwrap();
    assert_eq!(applied.digest, refused.refusal.unwrap().digest.unwrap());
    assert_eq!(mesh.plane.post::<Applied>(&path, &mesh.shown(&alice)).await.unwrap_err().status, 410, "once");

    let state = async |id: &str| mesh.plane.get::<ProposalDetail>(&format!("/v1/proposals/{id}")).await.proposal.state;
    let late = waits(&mesh.apply(vec![declare("b")], &named("alice")).await.unwrap_err());
    mesh.pass(5 * 60 + 1);
    assert_eq!(state(&late).await, ProposalState::Expired);
    let post =
        async |id: &str, shown: Shown| mesh.plane.post::<Applied>(&format!("/v1/proposals/{id}/apply"), &shown).await;
    assert_eq!(post(&late, mesh.shown(&alice)).await.unwrap_err().status, 410);

    let overtaken = waits(&mesh.apply(vec![declare("c")], &named("alice")).await.unwrap_err());
    let revision = mesh.apply(vec![declare("d")], &mesh.shown(&alice)).await.unwrap().revision;
    assert_eq!(state(&overtaken).await, ProposalState::Void { revision });
    assert_eq!(post(&overtaken, mesh.shown(&alice)).await.unwrap_err().status, 410);

    let taken_back = waits(&mesh.apply(vec![declare("e")], &named("alice")).await.unwrap_err());
    assert_eq!(mesh.answer(&taken_back, "withdraw", &named("alice")).await.unwrap_err().status, 403);
    assert_eq!(
        mesh.answer(&taken_back, "withdraw", &mesh.shown(&alice)).await.unwrap().state,
        ProposalState::Withdrawn
    );
    let bob = mesh.another(&alice, "bob", "editor").await;
    let unwanted = waits(&mesh.apply(vec![declare("f")], &named("alice")).await.unwrap_err());
    assert_eq!(mesh.answer(&unwanted, "reject", &mesh.shown(&alice)).await.unwrap_err().status, 403);
    let rejected = mesh.answer(&unwanted, "reject", &mesh.shown(&bob)).await.unwrap();
    assert_eq!(rejected.state, ProposalState::Rejected { by: operator("bob") });
    assert_eq!(post(&unwanted, mesh.shown(&alice)).await.unwrap_err().status, 410);
    let all: Vec<Proposal> = mesh.plane.get("/v1/proposals").await;
    assert_eq!(all.len(), 5, "what became of each is kept");
}

#[tokio::test]
async fn waiting_changes_are_bounded() {
    let (mesh, _, _) = Clocked::protected().await;
    for n in 0..countersign_control::store::PROPOSALS_OPEN_MAX {
        waits(&mesh.apply(vec![declare(&format!("s{n}"))], &named("alice")).await.unwrap_err());
    }
    let full = mesh.apply(vec![declare("more")], &named("alice")).await.unwrap_err();
    assert_eq!(full.status, 429, "{full:?}");
    mesh.pass(5 * 60 + 1);
    waits(&mesh.apply(vec![declare("more")], &named("alice")).await.unwrap_err());
}

#[tokio::test]
async fn two_who_enrol_first_at_the_same_time_are_not_both_first() {
    let mesh = Clocked::start().await;
    mesh.plane.create(&["web"]).await;
    let (alice, mallory) = (mesh.begin("alice", None).await.unwrap(), mesh.begin("mallory", None).await.unwrap());
    let (a, m) = (app_of(&alice).code(mesh.now() / 1000), app_of(&mallory).code(mesh.now() / 1000));
    let (a, m) = tokio::join!(mesh.confirm(&alice, a), mesh.confirm(&mallory, m));
    assert!(a.is_ok() != m.is_ok(), "{a:?} {m:?}");
    assert_eq!(mesh.mesh().await.state.operators.len(), 1);
    assert_eq!(mesh.mesh().await.state.trust_domain, Some(trust_domain()));
    assert_eq!(mesh.mesh().await.revision, Revision(2));
}

/// PROVES (granted-to-one)
#[tokio::test]
async fn what_a_code_opens_for_reading_is_open_to_its_operator_for_that_and_for_minutes() {
    let mesh = Clocked::start().await;
    mesh.plane.create(&["web"]).await;
    let opens = async |act: &str, shown: &Shown| mesh.plane.post::<Opened>(&format!("/v1/acts/{act}"), shown).await;
    let reads = async |who: &str| {
        let named = [(OPERATOR_HEADER, who)];
        mesh.plane.send_with("GET", "/v1/decisions", &named, Vec::new()).await.0
    };
    assert_eq!(opens("read_decisions", &Shown::default()).await.unwrap().operator, None, "unprotected");
    assert_eq!(reads("alice").await, 200);
    let (alice, _) = mesh.enrol("alice", None).await;
    let bob = mesh.another(&alice, "bob", "guest").await;
    let nothing = |who: &str| Shown { operator: Some(operator(who)), ..Shown::default() };

    let refused = opens("read_decisions", &nothing("bob")).await.unwrap_err();
    let refusal = refused.refusal.clone().unwrap();
    assert_eq!((refused.status, refusal.outcome, refusal.url), (403, GateOutcome::StepUp, None), "{refused:?}");
    assert_eq!(refusal.requires.unwrap().factor, Some(Factor::Mfa));
    for path in ["/v1/decisions", "/v1/decisions/0a", "/v1/decisions/tail"] {
        let named = [(OPERATOR_HEADER, "bob")];
        let (status, said) = mesh.plane.send_with("GET", path, &named, Vec::new()).await;
        assert_eq!(status, 403, "{path}: {}", String::from_utf8_lossy(&said));
    }
    let shown = mesh.shown(&bob);
    let opened = opens("read_decisions", &shown).await.unwrap();
    assert_eq!(opened.until_ms, Some(mesh.now() + 15 * 60 * 1000));
    assert_eq!((reads("bob").await, reads("alice").await, reads("zoe").await), (200, 403, 403), "nobody else's");
    assert!(opens("read_decisions", &nothing("bob")).await.is_ok(), "nothing more is asked for");
    let again = opens("export_ledger", &shown).await.unwrap_err();
    assert_eq!((again.status, &*again.title), (403, "the code was used already"), "and nothing else is open");

    let mesh_after = mesh;
    let mesh = mesh_after.restart().await;
    let reads = async |who: &str| {
        let named = [(OPERATOR_HEADER, who)];
        mesh.plane.send_with("GET", "/v1/decisions", &named, Vec::new()).await.0
    };
    assert_eq!(reads("bob").await, 200, "the store keeps it");
    mesh.pass(15 * 60 - 1);
    assert_eq!(reads("bob").await, 200, "to the last second");
    mesh.pass(2);
    assert_eq!(reads("bob").await, 403, "its time is over");

    let opened = mesh.plane.post::<Opened>("/v1/acts/read_decisions", &mesh.shown(&bob)).await;
    assert!(opened.is_ok() && reads("bob").await == 200);
    mesh.apply(vec![Change::RemoveOperator { name: operator("bob") }], &mesh.shown(&alice)).await.unwrap();
    assert_eq!(reads("bob").await, 403, "no operator any more");
    let unknown = mesh.plane.post::<Opened>("/v1/acts/invite_host", &mesh.shown(&alice)).await.unwrap_err();
    assert_eq!(unknown.status, 404, "only reading is opened ahead");
}

#[tokio::test]
async fn a_host_is_let_in_by_who_may_with_a_code_that_is_good_for_one_token() {
    let (mesh, alice, _) = Clocked::protected().await;
    let eve = mesh.another(&alice, "eve", "editor").await;
    let bob = mesh.another(&alice, "bob", "guest").await;
    let invite = Invite { ttl_seconds: 60, host: None, services: None };
    let invites = async |invite: &Invite, shown: Shown| {
        mesh.plane.post::<Invitation>("/v1/hosts/invitations", &InviteAs { invite: invite.clone(), shown }).await
    };
    let nothing = |who: &str| Shown { operator: Some(operator(who)), ..Shown::default() };
    assert_eq!(invites(&invite, Shown::default()).await.unwrap_err().status, 400, "several could be meant");
    let refused = invites(&invite, nothing("eve")).await.unwrap_err();
    assert_eq!(refused.refusal.unwrap().outcome, GateOutcome::StepUp);
    let shown = mesh.shown(&eve);
    let too_long = Invite { ttl_seconds: 1_000_000, ..invite.clone() };
    assert_eq!(invites(&too_long, shown.clone()).await.unwrap_err().status, 422, "said before a code is used up");
    assert!(invites(&invite, shown.clone()).await.is_ok());
    assert_eq!(invites(&invite, shown).await.unwrap_err().title, "the code was used already");
    assert_eq!(invites(&invite, nothing("eve")).await.unwrap_err().status, 403, "nothing stays open");
    let denied = invites(&invite, mesh.shown(&bob)).await.unwrap_err();
    assert_eq!(denied.refusal.unwrap().outcome, GateOutcome::Denied, "a role that lets nobody in");
}

#[tokio::test]
async fn identities_are_revoked_by_who_may_with_a_code_that_is_good_once() {
    let (mesh, alice, _) = Clocked::protected().await;
    let eve = mesh.another(&alice, "eve", "editor").await;
    let bob = mesh.another(&alice, "bob", "deployer").await;
    let control = IdentityFilter { id: Some(trust_domain().control()), ..IdentityFilter::default() };
    let revokes = async |identities: &IdentityFilter, shown: Shown| {
        let asked = RevokeAs { identities: identities.clone(), reason: "lost".into(), shown };
        mesh.plane.post::<Revoked>("/v1/identities/revoke", &asked).await
    };
    let nothing = Shown { operator: Some(operator("eve")), ..Shown::default() };
    let refused = revokes(&control, nothing.clone()).await.unwrap_err();
    assert_eq!(refused.refusal.unwrap().outcome, GateOutcome::StepUp);
    let denied = revokes(&control, mesh.shown(&bob)).await.unwrap_err();
    assert_eq!(denied.refusal.unwrap().outcome, GateOutcome::Denied, "a role that deploys only");
    let shown = mesh.shown(&eve);
    let nobody = IdentityFilter { host: Some(name("nowhere")), ..IdentityFilter::default() };
    assert_eq!(revokes(&nobody, shown.clone()).await.unwrap_err().status, 404, "said before a code is used up");
    let revoked = revokes(&control, shown.clone()).await.unwrap();
    assert_eq!(revoked.identities[0].revoked.as_ref().unwrap().by, "eve");
    assert_eq!(revokes(&control, shown).await.unwrap_err().title, "the code was used already");
    assert_eq!(revokes(&control, nothing).await.unwrap_err().status, 403, "nothing stays open");
}

/// PROVES (let-in-by-somebody)
/// PROVES (nothing-joins-blind)
/// PROVES (barred-is-not-found)
#[tokio::test]
async fn codes_that_fail_raise_the_risk_of_their_operator_which_the_gate_goes_by_and_which_falls() {
    let mesh = Clocked::start().await;
    mesh.plane.create(&["web", "catalog"]).await;
    mesh.put_up(
        "@id(\"all\") permit (principal, action, resource);
        @id(\"code\") @step_up(\"mfa\") @max_age(\"300\") forbid (principal, action, resource);
        @id(\"at-risk\") @countersign(\"1\") forbid (principal, action in Action::\"registrations\", resource)
        when { context has risk.operator && context.risk.operator >= 20 };",
    )
    .await;
    let (alice, _) = mesh.enrol("alice", None).await;
    let bob = mesh.another(&alice, "bob", "owner").await;
    mesh.apply(vec![declare("one")], &mesh.shown(&alice)).await.unwrap();
    let wrong = Shown { otp: Some(Code("000000".into())), ..named("alice") };
    for _ in 0..2 {
        mesh.pass(60);
        assert_eq!(outcome(&mesh.apply(vec![declare("two")], &wrong).await.unwrap_err()), GateOutcome::StepUp);
    }
    let risk = async |shown: &Shown| -> RiskView {
        let opened: Opened = mesh.plane.post("/v1/acts/read_signals", shown).await.unwrap();
        let operator = opened.operator.unwrap();
        let headers = [(OPERATOR_HEADER, operator.as_str())];
        let found = mesh.plane.send_with("GET", "/v1/risks?subject=operator:alice", &headers, Vec::new()).await;
        serde_json::from_slice::<Vec<RiskView>>(&found.1).unwrap().remove(0)
    };
    let (of_bob, clears) = (mesh.shown(&bob), "/v1/signals/clear");
    let found = risk(&of_bob).await;
    assert!((20..=28).contains(&found.risk), "two of 15: {found:?}");
    assert!(found.why.contains("countersign/factor-refused said"), "{found:?}");
    let refused = mesh.apply(vec![declare("two")], &mesh.shown(&alice)).await.unwrap_err();
    assert_eq!(outcome(&refused), GateOutcome::NeedsCountersign, "what was enough before is not");
    mesh.apply(vec![declare("three")], &mesh.shown(&bob)).await.expect("bob is at no risk");

    let asked = |shown: Shown| ClearSignalsAs {
        subject: Subject::Operator(operator("alice")),
        kind: Kind::Risk,
        source: None,
        reason: "it was she".into(),
        shown,
    };
    let own = mesh.plane.post::<SignalSent>(clears, &asked(mesh.shown(&alice))).await.unwrap_err();
    assert_eq!(own.status, 403, "nobody clears themselves: {own:?}");
    let unshown = mesh.plane.post::<SignalSent>(clears, &asked(named("bob"))).await.unwrap_err();
    assert_eq!(outcome(&unshown), GateOutcome::StepUp, "a code is needed");
    mesh.pass(3_600);
    mesh.apply(vec![declare("four")], &mesh.shown(&alice)).await.expect("it fell by half in an hour");
    mesh.plane.post::<SignalSent>(clears, &asked(mesh.shown(&bob))).await.unwrap();
    mesh.pass(60);
    assert_eq!(risk(&mesh.shown(&bob)).await.risk, 0);
}

#[tokio::test]
async fn a_new_service_is_found_by_nobody_until_it_is_approved_with_all_of_its_checklist() {
    let (mesh, alice, _) = Clocked::protected().await;
    let mut agent = mesh.plane.agent("h1").await;
    let mut other = mesh.plane.agent("h2").await;
    let stream = agent.follow(0, Digest::default()).await.unwrap();
    let mut told = other.follow(0, Digest::default()).await.unwrap();
    told.welcome().await;
    let shop = || name("shop");
    let quarantine = || Change::QuarantineService { name: shop() };
    let approve = || Change::ApproveService { name: shop() };
    for (case, changes) in [
        ("bare", vec![declare("shop")]),
        ("approved at once", vec![declare("shop"), quarantine(), approve()]),
        ("under a name that is active", vec![Change::RemoveService { name: name("web") }, declare("web")]),
    ] {
        let change_set = ChangeSet { base: mesh.mesh().await.revision, changes };
        let apply = Apply { change_set, bodies: Bodies::default() };
        let refused = mesh.exactly(apply, &mesh.shown(&alice)).await.unwrap_err();
        assert_eq!(refused.status, 422, "{case}: {refused:?}");
    }
    mesh.apply(vec![declare("shop")], &mesh.shown(&alice)).await.unwrap();
    let state = async || {
        let services = mesh.plane.status().await.services;
        services.into_iter().find(|service| service.name == shop()).unwrap().state
    };
    assert_eq!(state().await, "quarantined");

    stream.up("shop/1", "127.0.0.1:9001").await;
    stream.up("web/1", "127.0.0.1:9002").await;
    let discovered = async |told: &mut support::Stream| loop {
        if let Event::Discovery(discovery) = told.news().await {
            break (discovery.up.into_iter().map(|up| up.instance).collect::<Vec<_>>(), discovery.down);
        }
    };
    assert_eq!(discovered(&mut told).await, (vec!["web/1".to_owned()], vec![]), "the first is told of to nobody");

    let missing = async || {
        let checklist: Vec<Checked> = mesh.plane.get("/v1/services/shop/checklist").await;
        checklist.into_iter().filter(|one| one.help.is_some()).map(|one| one.what).collect::<Vec<_>>()
    };
    assert_eq!(missing().await, ["identity", "enforcement", "telemetry", "policy", "contract"]);
    let shown = mesh.shown(&alice);
    let refused = mesh.apply(vec![approve()], &shown).await.unwrap_err();
    assert_eq!((refused.status, &*refused.title), (422, "service `shop` cannot be approved yet"));
    assert_eq!(refused.detail.unwrap().lines().count(), 5);
    let (policy, bodies) = support::permit("web-reads-shop", "web", "shop");
    mesh.apply_with(vec![policy], bodies, &shown).await.expect("the code was not used up");
    agent.issue("shop/1").await.unwrap();
    assert_eq!(missing().await, ["enforcement", "telemetry", "contract"]);
    let waived = ServiceSpec { without_contract: true, ..ServiceSpec::new(Protocol::Http) };
    let waive = Change::DeclareService { name: shop(), spec: waived };
    mesh.apply(vec![waive], &mesh.shown(&alice)).await.expect("told to do without, in the ledger");
    assert_eq!(missing().await, ["enforcement", "telemetry"]);
    let nonce = agent.begin_probe("shop/1").await.unwrap();
    let (record, probed) = support::Stream::probed("shop/1", &nonce);
    stream.say(record).await;
    stream.say(probed).await;
    while missing().await != ["enforcement"] {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    stream.acknowledge("shop/1", mesh.mesh().await.revision.0).await;
    while !missing().await.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let dora = mesh.another(&alice, "dora", "deployer").await;
    stream.acknowledge("shop/1", mesh.mesh().await.revision.0).await;
    while !missing().await.is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let denied = mesh.apply(vec![approve()], &mesh.shown(&dora)).await.unwrap_err();
    assert_eq!(denied.refusal.unwrap().outcome, GateOutcome::Denied, "who deploys lets nobody in");
    mesh.apply(vec![approve()], &mesh.shown(&alice)).await.unwrap();
    assert_eq!(discovered(&mut told).await, (vec!["shop/1".to_owned()], vec![]));
    assert_eq!(state().await, "active");

    let suspend = Change::SuspendService { name: shop(), reason: "it leaks".into() };
    mesh.apply(vec![suspend], &mesh.shown(&alice)).await.unwrap();
    assert_eq!(discovered(&mut told).await, (vec![], vec!["shop/1".to_owned()]));
    assert_eq!(state().await, "suspended: it leaks");
    let welcome = other.follow(0, Digest::default()).await.unwrap().welcome().await;
    let found: Vec<_> = welcome.discovery.unwrap().up.into_iter().map(|up| up.instance).collect();
    assert_eq!(found, ["web/1"]);
    mesh.apply(vec![Change::ResumeService { name: shop() }], &mesh.shown(&alice)).await.unwrap();
    assert_eq!(state().await, "active");
}

#[tokio::test]
async fn an_enrolment_that_was_begun_ends_after_a_restart_too_and_is_guessed_at_five_times_in_all() {
    let mesh = Clocked::start().await;
    mesh.plane.create(&["web"]).await;
    let (kept, guessed) = (mesh.begin("alice", None).await.unwrap(), mesh.begin("alice", None).await.unwrap());
    let wrong = |enrolment: &Enrolment| {
        let right = app_of(enrolment).code(mesh.now() / 1000);
        format!("{}{}", if right.starts_with('0') { '1' } else { '0' }, &right[1..])
    };
    for _ in 0..3 {
        assert_eq!(mesh.confirm(&guessed, wrong(&guessed)).await.unwrap_err().status, 403);
    }
    let wrong = wrong(&guessed);
    let mesh = mesh.restart().await;
    for expected in [403, 403, 404] {
        assert_eq!(mesh.confirm(&guessed, wrong.clone()).await.unwrap_err().status, expected);
    }
    let right = app_of(&kept).code(mesh.now() / 1000);
    assert!(mesh.confirm(&kept, right.clone()).await.unwrap().anchor);
    assert_eq!(mesh.confirm(&kept, right).await.unwrap_err().status, 404, "once");
}
