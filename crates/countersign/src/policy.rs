//! `policy schema`, `test`, `lint` and `explain`. The law answers; this room reads the mesh directory, or asks the
//! control plane for the mesh in force, and renders.

use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use countersign_api::local::Mesh;
use countersign_core::{
    change::{Bodies, Revision},
    directory::{Directory, Mistake},
    identity::{ServiceName, SpiffeId},
    path::NormalPath,
    policy::{self as law, CameTo, Explanation, Law, Library, Query},
    record::Inputs,
    risk::{Condition, Posture},
    service::Protocol,
    state::MeshState,
    view::{self, Local},
};

use crate::{
    cli::{self, Global},
    client::Client,
    decision,
    error::{Done, Failure},
    mesh_directory, mesh_finder, mistake,
    operator::Asker,
    render::{self, Output, Paint, cell, verdict},
    status,
};

/// What can be done with policies.
#[derive(Debug, Subcommand)]
pub enum PolicyVerb {
    /// Print the Cedar schema that policies are validated against
    Schema,
    /// Put the questions of `tests/*.toml` to the policies of the directory
    Test(Where),
    /// Find policies that can never apply, are shadowed, or are too wide
    Lint(Where),
    /// Say which policies decide a request, and why
    Explain(Explain),
}

/// Which directory.
#[derive(Debug, Args)]
pub struct Where {
    /// The mesh directory [default: the one found from here]
    #[arg(value_name = "DIR")]
    pub mesh: Option<PathBuf>,
}

/// Which request.
#[derive(Debug, Args)]
pub struct Explain {
    /// Who asks: a service, or the full SPIFFE ID of a workload elsewhere
    #[arg(long, required_unless_present = "decision")]
    pub principal: Option<String>,
    /// What it wants to do: `http:GET`, `grpc:call`, `tcp:connect`
    #[arg(long, required_unless_present = "decision")]
    pub action: Option<String>,
    /// The service it asks
    #[arg(long, required_unless_present = "decision")]
    pub service: Option<ServiceName>,
    /// The path it asks for
    #[arg(long, default_value = "/")]
    pub path: String,
    /// The host it names [default: SERVICE.mesh]
    #[arg(long)]
    pub host: Option<String>,
    /// The length of its body, in bytes
    #[arg(long)]
    pub size: Option<u64>,
    /// Where it comes from
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub origin: IpAddr,
    /// It is the first of its kind
    #[arg(long)]
    pub first_contact: bool,
    /// The risk of the caller, 0 to 100
    #[arg(long, value_name = "RISK", default_value_t, value_parser = clap::value_parser!(u8).range(..=100))]
    pub risk: u8,
    /// Whether the caller's host is said to be as it should be [default: nobody says]
    #[arg(long, value_name = "BOOL")]
    pub compliant: Option<bool>,
    /// Whether the caller's host is said to be managed [default: nobody says]
    #[arg(long, value_name = "BOOL")]
    pub managed: Option<bool>,
    /// Ask the policies of the directory instead of those in force
    #[arg(long)]
    pub planned: bool,
    /// A decision that was made: its inputs, put to the policies in force (or planned)
    #[arg(long, value_name = "ID", conflicts_with_all = ["principal", "action", "service"])]
    pub decision: Option<String>,
    /// Who reads that decision.
    #[command(flatten)]
    pub asker: Asker,
}

/// Does it.
pub fn policy(verb: PolicyVerb, global: &Global) -> Done {
    match verb {
        PolicyVerb::Schema => {
            render::print(law::schema_text());
            Ok(())
        }
        PolicyVerb::Test(of) => test(&load(&of, global)?, global.output),
        PolicyVerb::Lint(of) => lint(&load(&of, global)?, global.output),
        PolicyVerb::Explain(arguments) => cli::ask(explain(arguments, global)),
    }
}

fn load(of: &Where, global: &Global) -> Result<Directory, Failure> {
    match &of.mesh {
        Some(dir) => mesh_directory::load(mesh_finder::at(dir, global.data_dir.as_deref())?.dir()?),
        None => mesh_directory::load(cli::place(global)?.dir()?),
    }
}

/// How one test went.
#[derive(Debug, Serialize)]
pub struct Tested {
    /// The file that it stands in.
    pub file: String,
    /// Its name.
    pub name: String,
    /// Whether the decision is the expected one.
    pub holds: bool,
    /// What came instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

impl Tested {
    /// What failed, when it did.
    pub fn failed(self) -> Option<String> {
        self.failure.map(|failure| format!("{} ({}): {failure}", self.name, self.file))
    }
}

fn test(directory: &Directory, output: Output) -> Done {
    let (tested, mistakes) = run_tests(directory)?;
    if !mistakes.is_empty() {
        let what = format!("the tests of the mesh directory have {}", mistake::count(&mistakes));
        return Err(Failure::new(what).mistakes(mistakes));
    }
    let failed = tested.iter().filter(|test| !test.holds).count();
    render::answer(output, &tested, |tested, paint| {
        let mut text = String::new();
        for test in tested {
            let mark = if test.holds { paint.good("holds") } else { paint.bad("FAILS") };
            let _ = writeln!(text, "{mark} {} {}", test.name, paint.dim(&test.file));
            for line in test.failure.iter().flat_map(|failure| failure.lines()) {
                let _ = writeln!(text, "      {line}");
            }
        }
        let _ = writeln!(text, "{} hold, {failed} fail", tested.len() - failed);
        text
    })?;
    match failed {
        0 => Ok(()),
        _ => Err(Failure::new(format!("{failed} of {} tests fail", tested.len()))
            .help("`countersign policy explain --planned …` says what each policy came to")),
    }
}

/// Puts the questions of `tests/*.toml` to the policies of `directory`. A file with mistakes asks nothing.
pub fn run_tests(directory: &Directory) -> Result<(Vec<Tested>, Vec<Mistake>), Failure> {
    let (state, bodies) = mesh_directory::state(directory);
    let library = library(&state, &bodies)?;
    let (mut tested, mut mistakes) = (Vec::new(), Vec::new());
    for (file, text) in &directory.tests {
        match law::parse_cases(text, &state) {
            Err(found) => mistakes.extend(found.into_iter().map(|mistake| Mistake {
                file: file.clone(),
                text: text.clone(),
                span: mistake.span,
                what: mistake.what,
                help: mistake.help,
            })),
            Ok(cases) => {
                let results = law::run_cases(&cases, &state, &library).map_err(|errors| {
                    errors
                        .iter()
                        .fold(Failure::new("could not run the policy tests"), |failure, e| failure.cause(e.to_string()))
                })?;
                tested.extend(results.into_iter().map(|result| Tested {
                    file: file.to_string(),
                    name: cases[result.case].name.clone(),
                    holds: result.failure.is_none(),
                    failure: result.failure,
                }));
            }
        }
    }
    Ok((tested, mistakes))
}

fn lint(directory: &Directory, output: Output) -> Done {
    let (state, bodies) = mesh_directory::state(directory);
    let found = law::lint(&state, &library(&state, &bodies)?);
    render::answer(output, &found, |found, paint| {
        if found.is_empty() {
            return format!("{} {} policies, nothing to look at\n", paint.good("clean:"), state.policies.len());
        }
        let mut text = String::new();
        for finding in found {
            let _ = writeln!(
                text,
                "{} policy {} {}",
                paint.warn("look:"),
                paint.strong(&finding.id),
                paint.dim(&finding.file)
            );
            let _ = writeln!(text, "  {}\n  {} {}", finding.what, paint.note("help:"), finding.help);
        }
        text
    })?;
    match found.len() {
        0 => Ok(()),
        count => Err(Failure::new(format!("{count} policies need a look"))
            .help("change them, or say in a comment why they are right")),
    }
}

async fn explain(arguments: Explain, global: &Global) -> Done {
    let place = cli::place(global)?;
    let control = Client::control(&place);
    let mesh = if arguments.planned {
        let (state, bodies) = mesh_directory::state(&mesh_directory::load(place.dir()?)?);
        Mesh { revision: Revision::default(), state, bodies }
    } else {
        control.get("/v1/mesh").await.map_err(|e: Failure| e.or_help("or ask the directory: `--planned`"))?
    };
    let inputs = match &arguments.decision {
        Some(id) => decision::detail(control, id, &arguments.asker).await?.record.inputs,
        None => {
            let inputs = inputs(&arguments, &mesh.state)?;
            law_of(&mesh, &inputs.service)?.with_token(&inputs)
        }
    };
    let explanation = explained(&mesh, &inputs)?;
    render::answer(global.output, &explanation, |explanation, paint| text(explanation, &inputs, &mesh, paint))
}

fn inputs(arguments: &Explain, state: &MeshState) -> Result<Inputs, Failure> {
    let (Some(principal), Some(action), Some(service)) = (&arguments.principal, &arguments.action, &arguments.service)
    else {
        return Err(Failure::usage("who does what to which service is not said"));
    };
    let own = state.trust_domain.as_ref().ok_or_else(|| Failure::new("the mesh is empty: nothing was applied yet"))?;
    let principal = if principal.contains("://") {
        SpiffeId::parse(principal).map_err(|e| Failure::usage("did not understand --principal").because(&e))?
    } else {
        let name =
            ServiceName::parse(principal).map_err(|e| Failure::usage("did not understand --principal").because(&e))?;
        own.workload(&name)
    };
    let Some(declared) = state.services.get(service) else {
        let names: Vec<_> = state.services.keys().collect();
        return Err(Failure::new(format!("this mesh has no service `{service}`"))
            .help(format!("its services are: {}", status::join(&names))));
    };
    let method = match action.as_str() {
        "grpc:call" => "POST",
        "tcp:connect" => "CONNECT",
        other => match other.strip_prefix("http:").filter(|method| !method.is_empty()) {
            Some(method) => method,
            None => {
                return Err(Failure::usage(format!("`{}` is not an action", render::tame(other)))
                    .help("an action is `http:GET` (or another method), `grpc:call` or `tcp:connect`"));
            }
        },
    };
    let path = NormalPath::parse(&arguments.path).map_err(|e| {
        Failure::usage(format!("no proxy lets the path `{}` through", render::tame(&arguments.path))).because(&e)
    })?;
    Ok(Inputs {
        principal,
        action: action.as_str().into(),
        service: service.clone(),
        path: if declared.spec.protocol == Protocol::Tcp { "/".into() } else { path.as_str().into() },
        host: arguments.host.as_deref().map_or_else(|| format!("{service}.mesh").into(), Into::into),
        method: method.into(),
        protocol: declared.spec.protocol,
        size: arguments.size,
        origin: arguments.origin,
        now: i64::try_from(render::now_ms() / 1000).unwrap_or(i64::MAX),
        first_contact: arguments.first_contact,
        operation: None,
        token: None,
        condition: Condition {
            risk: arguments.risk,
            posture: Posture { compliant: arguments.compliant, managed: arguments.managed },
            contained: false,
        },
    })
}

/// The policies and contracts of `state`, parsed.
pub fn library(state: &MeshState, bodies: &Bodies) -> Result<Library, Failure> {
    let mut library = Library::default();
    library
        .take_up(state, |digest| bodies.get(digest))
        .map_err(|e| Failure::new("a policy or contract of the mesh cannot be read").cause(e))?;
    Ok(library)
}

/// The law of one service of `mesh`.
pub fn law_of(mesh: &Mesh, service: &ServiceName) -> Result<Law, Failure> {
    let could_not = || Failure::new(format!("could not compile the policies of revision {}", mesh.revision));
    let library = library(&mesh.state, &mesh.bodies)?;
    let local = Local { service: service.clone() };
    let view = view::view(&mesh.state, mesh.revision, &library, &local).map_err(|e| could_not().because(&e))?;
    Law::compile(&view).map_err(|errors| errors.iter().fold(could_not(), |failure, e| failure.cause(e.to_string())))
}

fn explained(mesh: &Mesh, inputs: &Inputs) -> Result<Explanation, Failure> {
    Ok(law_of(mesh, &inputs.service)?.explain(&Query::of(inputs)))
}

fn text(explanation: &Explanation, inputs: &Inputs, mesh: &Mesh, paint: Paint) -> String {
    let at = if mesh.revision == Revision::default() {
        "as planned".to_owned()
    } else {
        format!("revision {}", mesh.revision)
    };
    let mut text = format!(
        "{} {} {}\n{}\n\n",
        decision::outcome(explanation.outcome, paint),
        paint.strong(&format!("{} {} {}{}", inputs.principal, inputs.action, inputs.service, inputs.path)),
        paint.dim(&at),
        explanation.reason.in_words(),
    );
    if let Some(operation) = &explanation.operation {
        let _ = writeln!(text, "{} {}\n", paint.dim("operation"), render::tame(operation));
    }
    if explanation.policies.is_empty() {
        text.push_str("no policy is about this service: what no policy permits is denied\n");
        return text;
    }
    let rows = explanation.policies.iter().map(|policy| {
        let decided = explanation.by.contains(&policy.id);
        let came_to = match (&policy.came_to, decided) {
            (CameTo::Applied, true) => verdict("applied, and decided", policy.permits),
            (came_to, _) => cell(came_to),
        };
        vec![cell(&policy.id), cell(if policy.permits { "permit" } else { "forbid" }), came_to, cell(&policy.file)]
    });
    text.push_str(&render::table(&["POLICY", "EFFECT", "CAME TO", "FILE"], rows, paint));
    text
}
