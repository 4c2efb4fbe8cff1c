//! `signal send`, `list`, `clear`: what is said of workloads, hosts and operators, for a while. `signal wait`: until every connected proxy
//! enforces it. `risk list`, `explain`: what it comes to.

use std::time::Duration;

use clap::{Args, Subcommand};

use countersign_api::local::{ClearSignalsAs, RiskView, SendSignalAs, SignalSent, SignalView, SignalWaited};
use countersign_core::{
    gate::act::Act,
    identity::InstanceId,
    signal::{
        SignalSeq,
        statement::{Kind, Source, Subject},
    },
};

use crate::{
    cli::span,
    client::{Client, query},
    error::{Done, Failure},
    mesh_finder::Place,
    operator::Asker,
    render::{self, Output, Paint, cell},
};

/// What can be done with signals.
#[derive(Debug, Subcommand)]
pub enum SignalVerb {
    /// Say something of a workload, a host or an operator for a while, and wait until every proxy goes by it
    ///
    /// Of a risk of 80: `--kind risk --value 80`. Of a host: `--kind posture --value not_compliant`, or `--kind management --value
    /// managed`. Saying it again replaces what you said of it before.
    Send(Send),
    /// List what is said, by whom and why
    List {
        /// What is said of this one: `workload:web`, `instance:web/1-6a30a4de`, `host:vm`, `operator:alice`, `family:ID`
        #[arg(long, value_name = "SUBJECT")]
        subject: Option<Subject>,
        /// What is said about this: `risk`, `posture`, `management` or `containment`
        #[arg(long, value_name = "KIND")]
        kind: Option<Kind>,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Take back what is said, and wait until every proxy goes by it
    Clear {
        /// What is said of this one: `workload:web`, `instance:web/1-6a30a4de`, `host:vm`, `operator:alice`, `family:ID`
        #[arg(long, value_name = "SUBJECT")]
        subject: Subject,
        /// What is said about this: `risk`, `posture`, `management` or `containment`
        #[arg(long, value_name = "KIND")]
        kind: Kind,
        /// Only what this source says, as `signal list` names it [default: whoever says it]
        #[arg(long, value_name = "SOURCE", value_parser = Source::parse)]
        source: Option<Source>,
        /// Why, and who asks.
        #[command(flatten)]
        because: Because,
    },
    /// Wait until every connected proxy enforces all signals up to a number
    Wait {
        /// The number, as the command that sent it says
        signal: u64,
        /// How long to wait
        #[arg(long, value_name = "SPAN", default_value = "10s", value_parser = span)]
        timeout: Duration,
    },
}

/// Why something is asked for that every proxy is to enforce, and by whom.
#[derive(Debug, Clone, Args)]
pub struct Because {
    /// Why, for whoever reads of it later
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
    /// How long to wait until every connected proxy enforces it
    #[arg(long, value_name = "SPAN", default_value = "10s", value_parser = span)]
    pub timeout: Duration,
    /// Who asks.
    #[command(flatten)]
    pub asker: Asker,
}

/// What is said.
#[derive(Debug, Clone, Args)]
pub struct Send {
    /// Of whom: `workload:web`, `instance:web/1-6a30a4de`, `host:vm`, `operator:alice`, `family:ID`
    #[arg(long, value_name = "SUBJECT")]
    subject: Subject,
    /// About what: `risk`, `posture`, `management` or `containment`
    #[arg(long, value_name = "KIND")]
    kind: Kind,
    /// What: of a risk 0 to 100, of posture `compliant` or `not_compliant`, of management `managed` or `unmanaged`, of
    /// containment `contained`
    #[arg(long, value_name = "VALUE")]
    value: String,
    /// The risk falls by half in each such time [default: it stays until it ends]
    #[arg(long, value_name = "SPAN", value_parser = span)]
    half_life: Option<Duration>,
    /// For how long it is said
    #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = span)]
    ttl: Duration,
    /// Why, and who asks.
    #[command(flatten)]
    because: Because,
}

/// Who is contained, or let go.
#[derive(Debug, Clone, Args)]
pub struct Contained {
    /// Whom: `workload:web`, `instance:web/1-6a30a4de`, `host:vm`
    subject: Subject,
    /// Why, and who asks.
    #[command(flatten)]
    because: Because,
}

/// What can be asked about risk.
#[derive(Debug, Subcommand)]
pub enum RiskVerb {
    /// List the risk of everybody of whom any is said, the highest first
    List {
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
    /// Say why the risk of one is what it is
    Explain {
        /// Whose: `workload:web`, `instance:web/1-6a30a4de`, `host:vm`, `operator:alice`, `family:ID`
        subject: Subject,
        /// Who asks.
        #[command(flatten)]
        asker: Asker,
    },
}

/// Says something.
pub async fn send(place: &Place, said: Send, output: Output) -> Done {
    let Send { subject, kind, value, half_life, ttl, because: Because { reason, timeout, asker } } = said;
    let half_life_ms = half_life.map(|span| span.as_millis() as u64);
    let (lifetime_ms, shown) = (ttl.as_millis() as u64, asker.shown());
    let asked = SendSignalAs { subject, kind, value, half_life_ms, lifetime_ms, reason, shown };
    let control = Client::control(place);
    let sent: SignalSent = control.post("/v1/signals", &asked).await?;
    tell(&control, &sent, "sent:", timeout, output).await
}

/// Takes something back.
pub async fn clear(
    place: &Place,
    subject: Subject,
    kind: Kind,
    source: Option<Source>,
    because: Because,
    output: Output,
) -> Done {
    let Because { reason, timeout, asker } = because;
    let control = Client::control(place);
    let asked = ClearSignalsAs { subject, kind, source, reason, shown: asker.shown() };
    let sent: SignalSent = control.post("/v1/signals/clear", &asked).await?;
    tell(&control, &sent, "cleared:", timeout, output).await
}

/// Keeps somebody from everybody, for `ttl` or until they are released.
pub async fn contain(place: &Place, whom: Contained, ttl: Duration, output: Output) -> Done {
    let Contained { subject, because } = whom;
    let (kind, value) = (Kind::Containment, "contained".to_owned());
    send(place, Send { subject, kind, value, half_life: None, ttl, because }, output).await
}

/// Lets them go again, whoever contained them.
pub async fn release(place: &Place, whom: Contained, output: Output) -> Done {
    let Contained { subject, because } = whom;
    clear(place, subject, Kind::Containment, None, because, output).await
}

async fn tell(control: &Client, sent: &SignalSent, done: &str, timeout: Duration, output: Output) -> Done {
    let waited = wait(control, sent.signal, timeout).await?;
    render::answer(output, sent, |sent, paint| {
        let count = match sent.statements {
            1 => "1 statement".to_owned(),
            more => format!("{more} statements"),
        };
        format!("{} {count}, by signal {}\n", paint.good(done), sent.signal.0)
    })?;
    say(&waited, output)
}

/// Lists what is said.
pub async fn list(place: &Place, subject: Option<Subject>, kind: Option<Kind>, asker: &Asker, output: Output) -> Done {
    let asked = query([("subject", subject.map(|s| s.to_string())), ("kind", kind.map(|k| k.to_string()))]);
    let control = asker.opens(Client::control(place), Act::ReadSignals).await?;
    let found: Vec<SignalView> = control.get(&format!("/v1/signals{asked}")).await?;
    render::answer(output, &found, |found, paint| match found.is_empty() {
        true => "nobody says anything of anybody\n".to_owned(),
        false => table(found, paint),
    })
}

/// Waits for one.
pub async fn wait_for(place: &Place, signal: u64, timeout: Duration, output: Output) -> Done {
    let waited = wait(&Client::control(place), SignalSeq(signal), timeout).await?;
    if output == Output::Json {
        render::answer(output, &waited, |_, _| String::new())?;
    }
    say(&waited, output)
}

/// Lists risks.
pub async fn risks(place: &Place, asker: &Asker, output: Output) -> Done {
    let found = ask_risks(place, None, asker).await?;
    render::answer(output, &found, |found, paint| {
        if found.is_empty() {
            return "nobody says anything of anybody's risk\n".to_owned();
        }
        let row = |one: &RiskView| vec![cell(&one.subject), cell(one.risk)];
        render::table(&["SUBJECT", "RISK"], found.iter().map(row), paint)
    })
}

/// Says why a risk is what it is.
pub async fn explain(place: &Place, subject: Subject, asker: &Asker, output: Output) -> Done {
    let found = ask_risks(place, Some(subject), asker).await?;
    render::answer(output, &found, |found, _| found.iter().map(|one| format!("{}\n", one.why)).collect())
}

async fn ask_risks(place: &Place, subject: Option<Subject>, asker: &Asker) -> Result<Vec<RiskView>, Failure> {
    let asked = query([("subject", subject.map(|subject| subject.to_string()))]);
    asker.opens(Client::control(place), Act::ReadSignals).await?.get(&format!("/v1/risks{asked}")).await
}

fn table(signals: &[SignalView], paint: Paint) -> String {
    let now_ms = render::now_ms();
    let row = |one: &SignalView| {
        let said = &one.statement;
        vec![
            cell(one.signal.0),
            cell(&said.subject),
            cell(said.kind()),
            cell(said.said),
            cell(&said.source),
            cell(render::distance(said.issued_at_ms, now_ms)),
            cell(render::distance(said.expires_at_ms, now_ms)),
            cell(render::tame(&one.reason)),
        ]
    };
    let names = ["SIGNAL", "SUBJECT", "KIND", "VALUE", "BY", "SAID", "ENDS", "REASON"];
    render::table(&names, signals.iter().map(row), paint)
}

/// Waits until every connected proxy enforces `signal`, at most for so long.
pub async fn wait(control: &Client, signal: SignalSeq, within: Duration) -> Result<SignalWaited, Failure> {
    let timeout = query([("timeout_ms", Some(within.as_millis().to_string()))]);
    control.get(&format!("/v1/signals/{}/wait{timeout}", signal.0)).await
}

/// Says how the wait for a signal ended: a failure while some proxy does not enforce it.
pub fn say(waited: &SignalWaited, output: Output) -> Done {
    if waited.enforced {
        if output == Output::Text {
            println!("{} all {} proxies enforce it", Paint::stdout().good("enforced:"), waited.connected);
        }
        return Ok(());
    }
    let missing: Vec<&str> = waited.missing.iter().take(10).map(InstanceId::as_str).collect();
    let what = format!("{} of {} proxies do not enforce it yet", waited.missing.len(), waited.connected);
    Err(Failure::new(what)
        .cause(missing.join(", "))
        .help("the signal stands; proxies that are cut off answer 503 when what they hold is too old"))
}
