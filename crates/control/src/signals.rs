//! What is said of workloads, hosts and operators: by operators who pass the gate, and by the mesh itself, which raises the risk of
//! whoever it notices something about. A statement is a signal as a revocation is: durable, numbered, told to every agent at once,
//! and known to every control plane of the store.
//!
//! Nothing is decided by it here: policies read it.

use countersign_api::local::{
    ClearSignalsAs, Problem, RevokedBy, RiskView, SendSignalAs, Shown, SignalFilter, SignalSent, SignalView,
};
use countersign_core::{
    gate::act::Act,
    risk,
    signal::{
        Signal, SignalSeq,
        statement::{Kind, Said, Score, Source, Statement, Subject},
    },
    token::TokenFault,
};

use crate::{
    Plane,
    acts::{self, By},
    audit::{self, Event},
    denials,
    identities::catch_up,
    local_api::{problem, store_problem},
    store::{StoreError, StoredSignal},
};

/// Statements that may hold at the same time, those among them that take others back. Every proxy holds all of them.
pub const STATEMENTS_MAX: u32 = 16_384;
/// The longest time for which something may be said.
pub const LIFETIME_MS_MAX: u64 = 30 * 24 * 3_600_000;
const LIFETIME_MS_MIN: u64 = 1_000;

/// How long the mesh itself says something.
const FINDING_LIFETIME_MS: u64 = 12 * 3_600_000;
/// In which time the risk of what it says falls by half.
const FINDING_HALF_LIFE_MS: u64 = 3_600_000;

/// What the mesh itself notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noticed {
    /// An access token of the subject was shown by somebody else, or it showed another's.
    Theft(TokenFault),
    /// A code of an operator was wrong, or too many were tried.
    FactorRefused,
    /// A key of an operator showed a count that it had shown before.
    KeyCloned,
    /// The telemetry of a sidecar is silent.
    Silence,
    /// A workload is denied in many ways: it tries doors.
    ManyDenials,
}

impl Noticed {
    /// The source that it is told by.
    fn source(self) -> Source {
        let name = match self {
            Self::Theft(_) => "countersign/token-theft",
            Self::FactorRefused => "countersign/factor-refused",
            Self::KeyCloned => "countersign/key-cloned",
            Self::Silence => "countersign/telemetry-silent",
            Self::ManyDenials => "countersign/many-denials",
        };
        Source::parse(name).expect("INVARIANT: it is a name of a source")
    }

    /// What one of them adds to the risk that this source sees, and the most that it comes to: neither a host that lies about others, nor
    /// somebody who fails on purpose in another's name, makes them a certain danger.
    fn weight(self) -> (u8, u8) {
        match self {
            Self::Theft(_) => (50, 75),
            Self::KeyCloned => (80, 95),
            Self::FactorRefused => (15, 50),
            Self::Silence => (30, 30),
            Self::ManyDenials => (30, 60),
        }
    }

    fn reason(self) -> String {
        match self {
            Self::Theft(fault) => format!("an access token was shown by somebody whose it is not: {}", fault.as_str()),
            Self::FactorRefused => "what was shown for a factor was refused".to_owned(),
            Self::KeyCloned => "a key showed a count that it had shown before".to_owned(),
            Self::Silence => "its telemetry has been silent for minutes".to_owned(),
            Self::ManyDenials => {
                let minutes = denials::WITHIN_MS / 60_000;
                format!("it was denied {} different things within {minutes} minutes", denials::WAYS_MAX)
            }
        }
    }
}

/// What is said now, the newest first.
pub async fn list(plane: &Plane, filter: SignalFilter) -> Result<Vec<SignalView>, StoreError> {
    let now_ms = plane.clock.now_ms();
    let stored = plane.storage.run("signals", |store| store.signals(SignalSeq(0))).await?;
    let view = |StoredSignal { sequence, signal, by }: StoredSignal| {
        let Signal::Stated(statement) = signal else { return None };
        let is_meant = filter.subject.as_ref().is_none_or(|subject| *subject == statement.subject)
            && filter.kind.is_none_or(|kind| kind == statement.kind());
        (is_meant && statement.holds(now_ms)).then_some(SignalView { signal: sequence, statement, reason: by.reason })
    };
    let mut views: Vec<_> = stored.into_iter().filter_map(view).collect();
    views.reverse();
    Ok(views)
}

/// The risk of every subject of which some is said, the highest first; or of one subject.
pub fn risks(plane: &Plane, subject: Option<Subject>) -> Vec<RiskView> {
    let (signals, now_ms) = (plane.publisher.signals(), plane.clock.now_ms());
    let said = || {
        let risks = signals.statements().filter(|one| one.kind() == Kind::Risk && one.holds(now_ms));
        let mut subjects: Vec<Subject> = risks.map(|one| one.subject.clone()).collect();
        subjects.dedup();
        subjects
    };
    let subjects = subject.map_or_else(said, |subject| vec![subject]);
    let view = |subject: Subject| {
        let explained = signals.explain_risk(&subject, now_ms);
        RiskView { risk: explained.risk, why: explained.to_string(), subject }
    };
    let mut views: Vec<RiskView> = subjects.into_iter().map(view).collect();
    views.sort_by(|a, b| b.risk.cmp(&a.risk).then_with(|| a.subject.cmp(&b.subject)));
    views
}

/// Says something, if the gate lets whoever asks.
pub async fn send(plane: &Plane, asked: SendSignalAs, by: By<'_>) -> Result<SignalSent, Problem> {
    let SendSignalAs { subject, kind, value, half_life_ms, lifetime_ms, reason, shown } = asked;
    acts::is_a_reason(&reason)?;
    let said = Said::parse(kind, &value, half_life_ms).map_err(|error| problem(422, error.to_string(), None, None))?;
    if !kind.is_of(&subject) {
        let help = "posture and management are said of a host, containment of whatever is no operator";
        return Err(problem(422, format!("{kind} is not said of {subject}"), None, Some(help)));
    }
    if !(LIFETIME_MS_MIN..=LIFETIME_MS_MAX).contains(&lifetime_ms) {
        let help = "say it for one second to 30 days, and again before it ends";
        return Err(problem(422, "the time for which it is said is too short or too long", None, Some(help)));
    }
    mistake_of_subject(plane, &subject)?;
    let source = authored(plane, &subject, by, &shown).await?;
    let issued_at_ms = plane.clock.now_ms();
    let statement = Statement { subject, source, said, issued_at_ms, expires_at_ms: issued_at_ms + lifetime_ms };
    let author = statement.source.clone();
    put(plane, vec![statement], &author, reason).await
}

/// Takes back what is said, if the gate lets whoever asks.
pub async fn clear(plane: &Plane, asked: ClearSignalsAs, by: By<'_>) -> Result<SignalSent, Problem> {
    let ClearSignalsAs { subject, kind, source, reason, shown } = asked;
    acts::is_a_reason(&reason)?;
    let now_ms = plane.clock.now_ms();
    let signals = plane.publisher.signals();
    let meant = signals.about(&subject).filter(|one| {
        one.holds(now_ms) && one.kind() == kind && source.as_ref().is_none_or(|source| *source == one.source)
    });
    let cleared: Vec<Statement> = meant.map(|one| one.clearing(now_ms)).collect();
    // Looked at before a factor is used up for nothing.
    if cleared.is_empty() {
        let help = "`countersign signal list` shows what is said";
        return Err(problem(404, format!("nobody says anything of the {kind} of {subject}"), None, Some(help)));
    }
    let author = authored(plane, &subject, by, &shown).await?;
    put(plane, cleared, &author, reason).await
}

/// Raises the risk of a subject for what the mesh itself noticed. One that cannot be written is in the log.
pub async fn notice(plane: &Plane, subject: Subject, noticed: Noticed) {
    let (source, (adds, max)) = (noticed.source(), noticed.weight());
    let (signals, now_ms) = (plane.publisher.signals(), plane.clock.now_ms());
    let explained = signals.explain_risk(&subject, now_ms);
    let before = explained.parts.iter().find(|part| part.source == source).map_or(0, |part| part.counts);
    let value = risk::together(before, adds).min(max);
    let score = Score { value, half_life_ms: Some(FINDING_HALF_LIFE_MS) };
    let (said, expires_at_ms) = (Said::Risk(score), now_ms + FINDING_LIFETIME_MS);
    let (subject_told, author) = (subject.clone(), source.clone());
    let statement = Statement { subject, source, said, issued_at_ms: now_ms, expires_at_ms };
    if let Err(error) = put(plane, vec![statement], &author, noticed.reason()).await {
        tracing::error!(subject = %subject_told, ?noticed, error = error.title, "a risk could not be raised");
    }
}

/// Takes back what the mesh itself said of a subject, because it is so no longer.
pub async fn notice_end(plane: &Plane, subject: &Subject, noticed: Noticed) {
    let (source, now_ms) = (noticed.source(), plane.clock.now_ms());
    let signals = plane.publisher.signals();
    let held = signals.about(subject).find(|one| one.source == source && one.holds(now_ms));
    let Some(cleared) = held.map(|one| one.clearing(now_ms)) else { return };
    if let Err(error) = put(plane, vec![cleared], &source, "it is so no longer".to_owned()).await {
        tracing::error!(%subject, ?noticed, error = error.title, "a risk could not be taken back");
    }
}

/// Lets whoever asks pass, and says as whom they speak. Nobody speaks of themselves.
async fn authored(plane: &Plane, subject: &Subject, by: By<'_>, shown: &Shown) -> Result<Source, Problem> {
    let opened = acts::pass(plane, Act::SendSignal, by, shown).await?;
    let Some(operator) = opened.operator else {
        return Ok(Source::parse(crate::gate::LOCAL).expect("INVARIANT: it is a name of a source"));
    };
    if matches!(subject, Subject::Operator(about) if *about == operator) {
        let help = "another operator says it, or takes it back";
        return Err(problem(403, "nobody says anything of their own risk", None, Some(help)));
    }
    Ok(Source::operator(&operator))
}

async fn put(
    plane: &Plane,
    statements: Vec<Statement>,
    author: &Source,
    reason: String,
) -> Result<SignalSent, Problem> {
    let stored = |error: StoreError| store_problem(&error);
    let by = RevokedBy { at_ms: plane.clock.now_ms(), by: author.to_string(), reason: reason.clone() };
    let given = statements.clone();
    let put = plane.storage.run("put_statements", move |store| store.put_statements(&given, &by, STATEMENTS_MAX));
    let Some(signal) = put.await.map_err(stored)? else {
        let what = format!("more than {STATEMENTS_MAX} statements would hold at the same time");
        let help = "wait until some have ended, or say it of a whole host or workload";
        return Err(problem(422, what, None, Some(help)));
    };
    catch_up(plane).await.map_err(stored)?;
    plane.metrics.statements.inc_by(statements.len() as u64);
    for one in &statements {
        let (subject, kind, value) = (one.subject.to_string(), one.kind().as_str(), one.said.to_string());
        tracing::warn!(subject, kind, value, by = %author, reason, signal = signal.0, "a signal was sent");
        let (by, reason) = (author.to_string(), audit::cut(reason.as_str()));
        plane.tell(Event::Stated { by, reason, signal: signal.0, subject, kind, value });
    }
    Ok(SignalSent { signal, statements: statements.len() as u32 })
}

/// Whoever is not there is nobody to say anything of: most likely the name is mistyped, and somebody would go on unwarned.
fn mistake_of_subject(plane: &Plane, subject: &Subject) -> Result<(), Problem> {
    let head = plane.ledger.head();
    let state = head.follower.state();
    let (is_there, help) = match subject {
        Subject::Workload(service) => (state.services.contains_key(service), "`countersign service list` shows them"),
        // Instances come and go.
        Subject::Instance(instance) => {
            (state.services.contains_key(&instance.service()), "`countersign workload list` shows them")
        }
        Subject::Host(host) => {
            let is_there = plane.publisher.hosts().iter().any(|known| known.host == *host);
            (is_there, "`countersign host list` shows them")
        }
        // So do tokens.
        Subject::Family(_) => (true, ""),
        Subject::Operator(operator) => {
            (state.operators.contains_key(operator), "`countersign operator list` shows them")
        }
    };
    if is_there { Ok(()) } else { Err(problem(404, format!("there is no {subject}"), None, Some(help))) }
}
