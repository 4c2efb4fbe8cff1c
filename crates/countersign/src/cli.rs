//! The command line: a noun, then a verb. Parsing ends here; each noun has a file that does the work.
//!
//! No thread is started before a command asks for a runtime: `exec` enters namespaces, which only a process of one
//! thread may do.

use std::{ffi::OsString, future::Future, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, CommandFactory, Parser, Subcommand};

use countersign_api::local::Invite;
use countersign_core::{
    change::Change,
    identity::{ServiceName, TrustDomain},
    record::Outcome,
};

use crate::{
    agent, apply,
    authority::{self, AuthorityVerb},
    change, control, decision, declare, deploy, doctor,
    edge::{self, EdgeVerb},
    error::{Done, Failure},
    exec, host,
    identity::{self, IdentityVerb},
    init, ledger,
    login::{self, Dashboard},
    mesh_finder::{self, Place},
    onboard, operator, policy, propose, recover, render,
    render::{Output, Paint},
    run, service, session,
    signal::{self, RiskVerb, SignalVerb},
    status, store,
    telemetry::{self, Telemetry},
    token::{self, TokenVerb},
    up, workloads,
};

/// A zero-trust service mesh: every request is judged while it lives.
///
/// A command finds the mesh from the current directory (or -C DIR) upwards: the first directory with a `mesh.toml`.
/// Exit codes: 0 done, 1 failed, 2 the command line is wrong, 3 refused by the change gate or the law, or waiting for a
/// countersignature.
#[derive(Debug, Parser)]
#[command(name = "countersign", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// The noun.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The mesh directory, or any directory below it [default: the current directory]
    #[arg(short = 'C', global = true, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Where the mesh keeps its state [default: DIR/.countersign]
    #[arg(long, global = true, value_name = "DIR", env = "COUNTERSIGN_DATA_DIR", hide_env_values = true)]
    pub data_dir: Option<PathBuf>,
    /// Ask the mesh of this dashboard, on another machine, as who signed in with `login` [env: COUNTERSIGN_DASHBOARD]
    #[arg(long, global = true, value_name = "URL")]
    pub at: Option<String>,
    /// The form of the answer
    #[arg(short, long, global = true, value_enum, value_name = "FORM", default_value_t)]
    pub output: Output,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the whole mesh of a directory on this machine
    Up(up::Up),
    /// Run one command as a workload of a service, with its sidecar
    Run(run::Run),
    /// Run the control plane alone
    Control(control::ControlArguments),
    /// Run the agent of a host: its workloads and their sidecars
    Agent(agent::AgentArguments),
    /// Where the control plane keeps everything
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Hosts that may run workloads
    #[command(subcommand)]
    Host(HostVerb),
    /// Certificates that workloads and hosts prove themselves by
    #[command(subcommand)]
    Identity(identity::IdentityVerb),
    /// Access tokens that sidecars show each other
    #[command(subcommand)]
    Token(token::TokenVerb),
    /// What is said of workloads, hosts and operators, and decides
    #[command(subcommand)]
    Signal(SignalVerb),
    /// What it comes to
    #[command(subcommand)]
    Risk(RiskVerb),
    /// Keep a workload, an instance or a host from everybody at once, and cut what it has open
    Contain {
        /// Whom.
        #[command(flatten)]
        whom: signal::Contained,
        /// For how long, unless it is released before
        #[arg(long, value_name = "SPAN", default_value = "30d", value_parser = span)]
        ttl: Duration,
    },
    /// Let somebody go who is contained
    Release {
        /// Whom.
        #[command(flatten)]
        whom: signal::Contained,
    },
    /// What runs on this host, and what asked its agent for an identity
    #[command(subcommand)]
    Workload(WorkloadVerb),
    /// Write a small mesh directory that `up` runs
    Init(InitArguments),
    /// Write all that a new service needs, from its OpenAPI document or descriptor set: its table, contract, policies and tests, files for
    /// continuous integration, a systemd unit and Kubernetes manifests
    ///
    /// Nothing that is there is written over. What is proposed are policies by which callers may do what only reads.
    Onboard(onboard::OnboardArguments),
    /// Show what `apply` would change
    Plan(apply::PlanArguments),
    /// Make the mesh what its directory says
    Apply(apply::ApplyArguments),
    /// Propose, as a pipeline, what `apply` would change; an operator countersigns exactly that
    Propose(propose::ProposeArguments),
    /// Run a command as a running workload would run it: its namespace, environment and sidecar
    Exec(exec::Exec),
    /// Show the mesh at a glance
    Status,
    /// Services
    #[command(subcommand)]
    Service(ServiceVerb),
    /// People who may change the mesh
    #[command(subcommand)]
    Operator(operator::OperatorVerb),
    /// How operators show who they are
    #[command(subcommand)]
    Factor(operator::FactorVerb),
    /// Appoint an owner anew when nobody can show a factor any more: past the gate, with the mesh stopped
    ///
    /// It needs the data directory and what opens its keys, is written into the ledger with the reason, and is told by every
    /// command for a week. Agents of a sealed mesh do not follow it.
    Recover(recover::Recover),
    /// Sign this machine's commands in to a mesh that runs elsewhere: they then ask its dashboard, with `--at URL`
    ///
    /// Prints a code and opens the dashboard, on which an operator who has just signed in compares it and says yes. The session lasts
    /// for an hour after its last use and for 12 hours at most, in a file with a key that only this user can read. It admits no
    /// change by itself: what the gate asks for is shown for each.
    Login(login::LoginArguments),
    /// Say who is signed in
    Whoami,
    /// End the session of `login`, and forget it
    Logout,
    /// Who is signed in, in browsers and on command lines
    #[command(subcommand)]
    Session(session::SessionVerb),
    /// Changes of the mesh
    #[command(subcommand)]
    Change(ChangeVerb),
    /// Policies of the request gate
    #[command(subcommand)]
    Policy(policy::PolicyVerb),
    /// Decisions about requests
    #[command(subcommand)]
    Decision(DecisionVerb),
    /// Who came to which service, in which way, and what is let through where new edges are held
    #[command(subcommand)]
    Edge(EdgeVerb),
    /// The keys of the trust domain
    #[command(subcommand)]
    Authority(AuthorityVerb),
    /// The record of all changes
    #[command(subcommand)]
    Ledger(LedgerVerb),
    /// Check what the mesh needs of this machine, and say what to do
    Doctor,
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    Man {
        /// Where to
        dir: PathBuf,
    },
}

/// What can be done with a host.
#[derive(Debug, Subcommand)]
pub enum HostVerb {
    /// Make a token with which one host can join, once
    Invite {
        /// How long it is good for: `10m`, `1h`
        #[arg(long, value_name = "SPAN", default_value = "10m", value_parser = span)]
        ttl: Duration,
        /// The only host name it is good for
        #[arg(long)]
        host: Option<ServiceName>,
        /// The only services that the host may run [default: every declared one]
        #[arg(long, value_name = "NAMES", value_delimiter = ',')]
        services: Option<Vec<ServiceName>>,
        /// Who asks.
        #[command(flatten)]
        asker: operator::Asker,
    },
    /// List them, and the services that each may run
    List,
    /// Show one: what it runs, and what it proves itself by
    Show {
        /// Its name
        host: ServiceName,
    },
    /// Put a host out: what it proves itself by is revoked, what it runs is found by nobody, and it comes back by a new invitation alone
    Evict {
        /// Its name
        host: ServiceName,
        /// Why, and who asks.
        #[command(flatten)]
        because: signal::Because,
    },
}

/// What can be asked about what runs on this host.
#[derive(Debug, Subcommand)]
pub enum WorkloadVerb {
    /// List what the agent of this host started, the processes that it attested, and those that it refused lately
    List,
}

/// Where to write a new mesh directory.
#[derive(Debug, Args)]
pub struct InitArguments {
    /// The directory; it is created
    #[arg(value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// The trust domain of the mesh
    #[arg(long, default_value = "mesh.example")]
    pub trust_domain: TrustDomain,
}

/// What can be asked about services.
#[derive(Debug, Subcommand)]
pub enum ServiceVerb {
    /// List them
    List {
        /// Those only that wait to be approved
        #[arg(long)]
        pending: bool,
    },
    /// Let a quarantined service into the mesh, once all of its checklist is there
    Approve {
        /// Its name
        service: ServiceName,
        /// Who asks.
        #[command(flatten)]
        who: operator::Who,
    },
    /// Take a service out of the mesh for a while: what it and its callers have open is cut at once
    Suspend {
        /// Its name
        service: ServiceName,
        /// Why, for whoever reads of it later
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Who asks.
        #[command(flatten)]
        who: operator::Who,
    },
    /// Let a suspended service into the mesh again
    Resume {
        /// Its name
        service: ServiceName,
        /// Who asks.
        #[command(flatten)]
        who: operator::Who,
    },
    /// Show one with its instances
    Show {
        /// Its name
        service: ServiceName,
    },
    /// Write a new service into mesh.toml, beside what stands there
    ///
    /// It changes that file and nothing else; `plan` shows what it means for the mesh, and `apply` asks for it. Without a command after
    /// `--` the service runs already and listens at `--port`.
    Declare(declare::DeclareArguments),
    /// Say which executables may be instances of a service; from the first one on any other waits and does not run
    ///
    /// It adds to what was admitted before, so that the old and the new run beside each other; `--only` takes the old back.
    Deploy(deploy::DeployArguments),
    /// Print the SHA-256 that a command is deployed by, and what of it was read
    Artifact {
        /// The command, as mesh.toml has it, from the directory in which it runs
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
}

/// What can be asked about changes.
#[derive(Debug, Subcommand)]
pub enum ChangeVerb {
    /// List them, newest first
    List {
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: u32,
        /// Those that wait for a factor or for other operators, and what became of others
        #[arg(long)]
        pending: bool,
    },
    /// Show one in full
    Show {
        /// The revision it made, or the id of a pending one
        #[arg(value_name = "REVISION|ID")]
        change: change::Meant,
    },
    /// Wait until every connected proxy enforces a revision, or until a pending change is decided
    Wait {
        /// The revision, or the id of a pending change
        #[arg(value_name = "REVISION|ID")]
        change: change::Meant,
        /// How long to wait
        #[arg(long, value_name = "SPAN", default_value = "10s", value_parser = span)]
        timeout: Duration,
    },
    /// Stand behind what another operator asked for; it is applied when nobody is missing any more
    Countersign(change::Pending),
    /// Say no to what another operator asked for
    Reject(change::Pending),
    /// Take back what one asked for
    Withdraw(change::Pending),
}

/// What can be asked about decisions.
#[derive(Debug, Subcommand)]
pub enum DecisionVerb {
    /// Show them as they happen: denials in full, permits counted
    Tail {
        /// Which ones.
        #[command(flatten)]
        filter: Filter,
        /// Who asks.
        #[command(flatten)]
        asker: operator::Asker,
    },
    /// List kept ones, newest first
    List {
        /// Which ones.
        #[command(flatten)]
        filter: Filter,
        /// Who asks.
        #[command(flatten)]
        asker: operator::Asker,
    },
    /// Show one, judge it again at its revision, and say whether the answer is the same
    Show {
        /// Its id, or the beginning of it
        id: String,
        /// Who asks.
        #[command(flatten)]
        asker: operator::Asker,
    },
}

/// Which decisions.
#[derive(Debug, Clone, Args)]
pub struct Filter {
    /// About requests to this service
    #[arg(long)]
    pub service: Option<ServiceName>,
    /// About requests of this service, or of this SPIFFE ID
    #[arg(long)]
    pub principal: Option<String>,
    /// With this outcome: `permit`, `step_up` or `deny`
    #[arg(long, value_parser = outcome)]
    pub outcome: Option<Outcome>,
    /// Not older than this: `10m`
    #[arg(long, value_name = "SPAN", value_parser = span)]
    pub since: Option<Duration>,
    /// Those of exchanges that sidecars make with themselves as well
    #[arg(long)]
    pub probes: bool,
    /// Those only of the first exchange of a caller by an operation, or by a method and class of path
    #[arg(long)]
    pub first_contact: bool,
    /// At most so many
    #[arg(long, value_name = "N")]
    pub limit: Option<u32>,
}

/// What can be done with the ledger.
#[derive(Debug, Subcommand)]
pub enum LedgerVerb {
    /// Read all of it, compute its Merkle root and every state again, and compare; or verify an export offline
    Verify(ledger::VerifyArguments),
    /// Print the newest checkpoint: a note signed by the log, and by the witnesses that cosigned it
    Checkpoint,
    /// Print a proof that an entry stands in the ledger, or that the ledger continues an older one
    Prove(ledger::ProveArguments),
    /// Write all of it as files that anyone can verify with public keys alone
    Export {
        /// Where to: a directory that is empty, or that holds an older export of this ledger
        #[arg(value_name = "DIR")]
        into: PathBuf,
        /// Who asks.
        #[command(flatten)]
        asker: operator::Asker,
    },
    /// Cosign the checkpoints of other machines' ledgers, so that none of them can show two histories
    Witness(ledger::WitnessServer),
}

/// Parses the command line and does what it says.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    let output = cli.global.output;
    match dispatch(cli) {
        Ok(code) => code,
        Err(failure) => {
            // What the gate asks for is an answer, for a program that goes on from it.
            if let (Output::Json, Some(refusal)) = (output, failure.refusal()) {
                render::print(&render::json_line(refusal));
            }
            render::print_error(&failure.render(output, Paint::stderr()));
            failure.exit_code()
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    let Cli { global, command } = cli;
    let output = global.output;
    let done = match command {
        Command::Up(arguments) => serve(async |telemetry| up::up(arguments, &global, telemetry).await),
        Command::Run(arguments) => return serve(async |telemetry| run::run(arguments, &global, telemetry).await),
        Command::Control(arguments) => serve(async |telemetry| control::control(arguments, &global, telemetry).await),
        Command::Agent(arguments) => serve(async |telemetry| agent::agent(arguments, &global, telemetry).await),
        Command::Store(command) => ask(store::store(command)),
        Command::Plan(arguments) => ask(apply::plan(arguments, &global)),
        Command::Apply(arguments) => ask(apply::apply(arguments, &global)),
        Command::Propose(arguments) => ask(propose::propose(arguments, &global)),
        Command::Policy(verb) => policy::policy(verb, &global),
        Command::Exec(arguments) => return exec::exec(arguments, &here(&global)?),
        Command::Init(arguments) => init::init(&arguments, output),
        Command::Onboard(arguments) => onboard::onboard(&arguments, &here(&global)?, output),
        Command::Host(HostVerb::Invite { ttl, host, services, asker }) => {
            let services = services.map(|services| services.into_iter().collect());
            let invite = Invite { ttl_seconds: ttl.as_secs().max(1), host, services };
            ask(host::invite(&place(&global)?, invite, &asker, output))
        }
        Command::Host(HostVerb::List) => ask(host::list(&place(&global)?, output)),
        Command::Host(HostVerb::Show { host }) => ask(host::show(&place(&global)?, &host, output)),
        Command::Host(HostVerb::Evict { host, because }) => ask(host::evict(&place(&global)?, host, because, output)),
        Command::Workload(WorkloadVerb::List) => ask(workloads::list(&here(&global)?, output)),
        Command::Identity(IdentityVerb::List { which }) => ask(identity::list(&place(&global)?, which, output)),
        Command::Identity(IdentityVerb::Show { serial }) => ask(identity::show(&place(&global)?, serial, output)),
        Command::Identity(IdentityVerb::Revoke { which, because }) => {
            ask(identity::revoke(&place(&global)?, which, because, output))
        }
        Command::Token(TokenVerb::List { which, asker }) => ask(token::list(&place(&global)?, which, &asker, output)),
        Command::Token(TokenVerb::Show { id, asker }) => ask(token::show(&place(&global)?, id, &asker, output)),
        Command::Token(TokenVerb::Inspect { asker }) => ask(token::inspect(&place(&global)?, &asker, output)),
        Command::Token(TokenVerb::Revoke { meant, because }) => {
            ask(token::revoke(&place(&global)?, meant, because, output))
        }
        Command::Signal(SignalVerb::Send(said)) => ask(signal::send(&place(&global)?, said, output)),
        Command::Signal(SignalVerb::List { subject, kind, asker }) => {
            ask(signal::list(&place(&global)?, subject, kind, &asker, output))
        }
        Command::Signal(SignalVerb::Clear { subject, kind, source, because }) => {
            ask(signal::clear(&place(&global)?, subject, kind, source, because, output))
        }
        Command::Signal(SignalVerb::Wait { signal, timeout }) => {
            ask(signal::wait_for(&place(&global)?, signal, timeout, output))
        }
        Command::Risk(RiskVerb::List { asker }) => ask(signal::risks(&place(&global)?, &asker, output)),
        Command::Risk(RiskVerb::Explain { subject, asker }) => {
            ask(signal::explain(&place(&global)?, subject, &asker, output))
        }
        Command::Contain { whom, ttl } => ask(signal::contain(&place(&global)?, whom, ttl, output)),
        Command::Release { whom } => ask(signal::release(&place(&global)?, whom, output)),
        Command::Status => ask(status::status(&place(&global)?, output)),
        Command::Service(ServiceVerb::List { pending }) => ask(service::list(&place(&global)?, pending, output)),
        Command::Service(ServiceVerb::Approve { service, who }) => {
            ask(service::change(&place(&global)?, Change::ApproveService { name: service }, &who, output))
        }
        Command::Service(ServiceVerb::Suspend { service, reason, who }) => {
            let change = Change::SuspendService { name: service, reason: reason.into() };
            ask(service::change(&place(&global)?, change, &who, output))
        }
        Command::Service(ServiceVerb::Resume { service, who }) => {
            ask(service::change(&place(&global)?, Change::ResumeService { name: service }, &who, output))
        }
        Command::Service(ServiceVerb::Show { service }) => ask(service::show(&place(&global)?, &service, output)),
        Command::Service(ServiceVerb::Declare(arguments)) => declare::declare(&arguments, &place(&global)?, output),
        Command::Service(ServiceVerb::Deploy(arguments)) => ask(deploy::deploy(arguments, &place(&global)?, output)),
        Command::Service(ServiceVerb::Artifact { command }) => deploy::show(&command, output),
        Command::Operator(verb) => ask(operator::operator(verb, &place(&global)?, output)),
        Command::Factor(verb) => ask(operator::factor(verb, &place(&global)?, output)),
        Command::Recover(arguments) => ask(recover::recover(arguments, &here(&global)?, output)),
        Command::Login(arguments) => ask(login::login(arguments, &global)),
        Command::Whoami => ask(login::whoami(&global)),
        Command::Logout => ask(login::logout(&global)),
        Command::Session(verb) => ask(session::session(verb, &place(&global)?, output)),
        Command::Change(ChangeVerb::List { limit: _, pending: true }) => ask(change::pending(&place(&global)?, output)),
        Command::Change(ChangeVerb::List { limit, pending: false }) => {
            ask(change::list(&place(&global)?, limit, output))
        }
        Command::Change(ChangeVerb::Show { change }) => ask(change::show(&place(&global)?, change, output)),
        Command::Change(ChangeVerb::Wait { change, timeout }) => {
            ask(change::wait(&place(&global)?, change, timeout, output))
        }
        Command::Change(ChangeVerb::Countersign(asked)) => {
            ask(change::answer(&place(&global)?, "countersign", &asked, output))
        }
        Command::Change(ChangeVerb::Reject(asked)) => ask(change::answer(&place(&global)?, "reject", &asked, output)),
        Command::Change(ChangeVerb::Withdraw(asked)) => {
            ask(change::answer(&place(&global)?, "withdraw", &asked, output))
        }
        Command::Decision(DecisionVerb::Tail { filter, asker }) => {
            ask(decision::tail(&place(&global)?, filter, &asker, output))
        }
        Command::Decision(DecisionVerb::List { filter, asker }) => {
            ask(decision::list(&place(&global)?, filter, &asker, output))
        }
        Command::Decision(DecisionVerb::Show { id, asker }) => {
            ask(decision::show(&place(&global)?, &id, &asker, output))
        }
        Command::Edge(verb) => ask(edge::edge(&place(&global)?, verb, output)),
        Command::Authority(verb) => ask(authority::authority(&place(&global)?, verb, output)),
        Command::Ledger(LedgerVerb::Verify(arguments)) => ledger::verify(&arguments, || place(&global), output),
        Command::Ledger(LedgerVerb::Checkpoint) => ask(ledger::checkpoint(&place(&global)?, output)),
        Command::Ledger(LedgerVerb::Prove(arguments)) => ask(ledger::prove(&place(&global)?, arguments, output)),
        Command::Ledger(LedgerVerb::Export { into, asker }) => {
            ask(ledger::export(&place(&global)?, &into, &asker, output))
        }
        Command::Ledger(LedgerVerb::Witness(arguments)) => serve(async |_| ledger::witness(arguments, output).await),
        Command::Doctor => doctor::doctor(&global),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "countersign", &mut std::io::stdout());
            Ok(())
        }
        Command::Man { dir } => man(&dir),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// The mesh that the command is about, here or on another machine.
pub fn place(global: &Global) -> Result<Place, Failure> {
    match dashboard(global)? {
        Some(dashboard) => mesh_finder::afar(global.dir.as_deref(), dashboard),
        None => mesh_finder::find(global.dir.as_deref(), global.data_dir.as_deref()),
    }
}

/// The mesh that the command is about, on this machine: others can only be asked.
pub fn here(global: &Global) -> Result<Place, Failure> {
    if global.at.is_some() {
        return Err(Failure::usage("this command works on the machine of the mesh, not with `--at`")
            .help("run it there, or leave `--at` out"));
    }
    mesh_finder::find(global.dir.as_deref(), global.data_dir.as_deref())
}

/// The dashboard that commands are to ask: the one that is named, or that of the environment unless a data directory is named.
pub fn dashboard(global: &Global) -> Result<Option<Dashboard>, Failure> {
    let named = global.at.clone().or_else(|| match global.data_dir {
        Some(_) => None,
        None => std::env::var(login::VARIABLE).ok().filter(|url| !url.is_empty()),
    });
    named.as_deref().map(Dashboard::parse).transpose()
}

/// Runs a command that asks and ends: on this thread alone.
pub fn ask<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Failure::new("could not start").because(&e))?.block_on(work)
}

/// Runs a command that serves until it is told to stop: on all cores, with its events told.
fn serve<T>(work: impl AsyncFnOnce(&Telemetry) -> Result<T, Failure>) -> Result<T, Failure> {
    // Several crates bring a TLS library's hooks; only this provider is ever used. A second installation is harmless.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::new("could not start").because(&e))?;
    let result = runtime.block_on(async {
        let telemetry = telemetry::start()?;
        let result = work(&telemetry).await;
        telemetry.stop().await;
        result
    });
    // What a task blocks on cannot keep a stopped mesh alive.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn man(dir: &std::path::Path) -> Done {
    clap_mangen::generate_to(Cli::command(), dir).map_err(|e| {
        Failure::new(format!("could not write the manual pages to `{}`", dir.display()))
            .because(&e)
            .help("the directory must exist")
    })
}

/// A span of time: `10s`, `5m`, `1h`, `250ms`.
pub fn span(given: &str) -> Result<Duration, String> {
    let digits = given.find(|c: char| !c.is_ascii_digit()).unwrap_or(given.len());
    let (number, unit) = given.split_at(digits);
    let number: u64 =
        number.parse().map_err(|_| "a span is a number and a unit: `250ms`, `10s`, `5m`, `1h`".to_owned())?;
    let span = match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        "d" => number.checked_mul(86_400).map(Duration::from_secs),
        _ => return Err("the unit must be `ms`, `s`, `m`, `h` or `d`".to_owned()),
    };
    span.filter(|span| *span <= Duration::from_secs(366 * 86_400)).ok_or_else(|| "a span is at most a year".to_owned())
}

fn outcome(given: &str) -> Result<Outcome, String> {
    match given {
        "permit" => Ok(Outcome::Permit),
        "step_up" => Ok(Outcome::StepUp),
        "deny" => Ok(Outcome::Deny),
        _ => Err("an outcome is `permit`, `step_up` or `deny`".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_span_has_a_number_and_a_unit() {
        for (given, expected) in [
            ("250ms", Some(Duration::from_millis(250))),
            ("10s", Some(Duration::from_secs(10))),
            ("5m", Some(Duration::from_secs(300))),
            ("1d", Some(Duration::from_secs(86_400))),
            ("10", None),
            ("s", None),
            ("-1s", None),
            ("99999999999999999999s", None),
            ("18446744073709551615h", None),
            ("", None),
        ] {
            assert_eq!(span(given).ok(), expected, "{given}");
        }
    }

    /// Writes `docs/cli.md` with `UPDATE_DOCS=1`, and otherwise holds it to what the binary does.
    #[test]
    fn the_command_line_documents_itself() {
        let mut text = String::from(
            "# The command line\n\nWritten by a test from the commands themselves; `make docs` writes it again.\n",
        );
        let mut root = Cli::command().term_width(100);
        root.build();
        reference(&mut root, &mut text);
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == text, "docs/cli.md is not what the binary takes; `make docs` writes it again");
    }

    fn reference(command: &mut clap::Command, text: &mut String) {
        let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
        let help = command.render_long_help().to_string();
        let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        write!(text, "\n## `{name}`\n\n```text\n{}\n```\n", lines.join("\n")).unwrap();
        for below in command.get_subcommands_mut().filter(|below| below.get_name() != "help" && !below.is_hide_set()) {
            reference(below, text);
        }
    }
}
