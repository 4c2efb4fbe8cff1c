//! `onboard`: everything that a new service needs, from the document that says what it offers. In the mesh directory its table, its
//! contract, policies that its callers need at least, and tests that hold them to that; for continuous integration the files that plan and
//! propose; beside the service what starts it under systemd and in Kubernetes. All of it is made and examined before any is written, and nothing
//! that is there is written over.

mod files;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use clap::Args;
use countersign_core::{
    contract::{Contract, Operation},
    directory::{self, Directory, Files, MESH_FILE},
    identity::{ServiceName, TrustDomain},
    service::Protocol,
};
use toml_edit::{Array, DocumentMut, Item};

use crate::{
    declare::{self, DeclareArguments},
    error::{Done, Failure},
    mesh_directory,
    mesh_finder::Place,
    mistake, policy,
    render::{self, Output},
};

/// What a document that lists operations may be called, in the directory of the service or in one of these below it.
const DOCUMENTS: [&str; 6] =
    ["openapi.yaml", "openapi.yml", "openapi.json", "descriptor.binpb", "descriptor.pb", "descriptor.desc"];
const FOLDERS: [&str; 5] = ["", "api", "contracts", "docs", "proto"];
/// Longest document that is copied, in bytes: one more than the law takes.
const DOCUMENT_BYTES_MAX: u64 = 1024 * 1024 + 1;

/// A new service and who calls it.
#[derive(Debug, Args)]
pub struct OnboardArguments {
    /// The directory of the service, with its OpenAPI document or descriptor set
    #[arg(value_name = "DIR")]
    service_dir: PathBuf,
    /// Its name [default: that of the directory]
    #[arg(long)]
    name: Option<String>,
    /// The document that lists its operations [default: `openapi.yaml` and the like, found in the directory]
    #[arg(long, value_name = "FILE")]
    contract: Option<PathBuf>,
    /// A service that calls it, and by which operations; several times. Without operations: those that only read
    #[arg(long, value_name = "SERVICE[=OPERATION,…]")]
    caller: Vec<String>,
    /// Where it listens on 127.0.0.1
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// The class of the data it holds, for policies
    #[arg(long, value_name = "NAME")]
    sensitivity: Option<String>,
    /// Groups services, for policies
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Where agents reach the control plane, as it stands in what starts the service
    #[arg(long, value_name = "https://IP:PORT", default_value = "https://control.example:7443")]
    control: String,
    /// Where the control plane serves pipelines
    #[arg(long, value_name = "URL", default_value = "https://control.example:7450")]
    pipelines: String,
    /// The image that Kubernetes starts; it holds `countersign` as well
    #[arg(long, value_name = "IMAGE", default_value = "registry.example/service:latest")]
    image: String,
    /// What starts it
    #[arg(last = true, value_name = "COMMAND", required = true)]
    run: Vec<String>,
}

/// What the files are made from.
struct Onboarded<'a> {
    name: ServiceName,
    trust_domain: TrustDomain,
    protocol: Protocol,
    /// The mesh directory, from the root of its repository.
    mesh_dir: String,
    /// The contract's path below the mesh directory.
    contract: String,
    operations: Vec<Operation>,
    callers: BTreeMap<ServiceName, Callable>,
    arguments: &'a OnboardArguments,
}

/// Which operations a caller has.
struct Callable {
    /// By which it may call.
    permitted: Vec<Operation>,
    /// Whether somebody said which.
    is_said: bool,
}

/// A file that is to be there.
struct Planned {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// Makes it, unless what came of it would not be a mesh directory whose tests hold.
pub fn onboard(arguments: &OnboardArguments, place: &Place, output: Output) -> Done {
    let dir = place.dir()?;
    let service_dir = arguments.service_dir.canonicalize().map_err(|error| {
        Failure::new(format!("could not find `{}`", arguments.service_dir.display()))
            .because(&error)
            .help("name the directory that holds the service; nothing was written")
    })?;
    let name = name_of(arguments, &service_dir)?;
    let document = document_of(arguments, &service_dir)?;
    let (protocol, extension) = protocol_of(&document)?;
    let contract = format!("contracts/{name}.{extension}");
    let bytes = read(&document)?;

    let mesh_path = dir.join(MESH_FILE);
    let before = fs::read_to_string(&mesh_path).map_err(|error| could_not("read", &mesh_path, &error))?;
    let declared = DeclareArguments::of(
        name.as_str(),
        protocol,
        arguments.port,
        (arguments.namespace.clone(), arguments.sensitivity.clone()),
        arguments.run.clone(),
    );
    let mut toml: DocumentMut = before.parse().map_err(|error: toml_edit::TomlError| {
        Failure::new(format!("`{}` cannot be read", mesh_path.display()))
            .because(&error)
            .help("`countersign plan` shows where; nothing was written")
    })?;
    declare::add(&mut toml, &name, &declared, Some(&contract))?;
    for given in &arguments.caller {
        declares(&mut toml, given.split('=').next().unwrap_or_default(), &name);
    }
    let after = toml.to_string();

    // With the contract, as the mesh will read it: its operations are what policies can name.
    let (mut files, _) = mesh_directory::read_with(dir, Some(&after))?;
    files.insert(contract.clone(), mesh_directory::contract_text(&contract, &bytes));
    let with_contract = parsed(dir, &files)?;
    let operations = with_contract.services.get(&name).and_then(|service| service.contract.as_ref());
    let operations = operations.map(Contract::operations).unwrap_or_default().to_vec();
    let callers = callers_of(arguments, &with_contract, &name, &operations)?;
    let root = repository_of(dir);
    let below = dir.strip_prefix(&root).ok().and_then(Path::to_str).filter(|below| !below.is_empty());
    let made = Onboarded {
        name: name.clone(),
        trust_domain: with_contract.trust_domain.clone(),
        protocol,
        mesh_dir: below.unwrap_or(".").to_owned(),
        contract: contract.clone(),
        operations,
        callers,
        arguments,
    };

    let (policy_file, test_file) = (format!("policies/{name}.cedar"), format!("tests/{name}.toml"));
    let (policies, tests) = (made.policies(), made.tests());
    files.insert(policy_file.clone(), policies.clone());
    files.insert(test_file.clone(), tests.clone());
    holds(dir, &files)?;

    let planned = [
        (dir.join(&contract), bytes),
        (dir.join(&policy_file), policies.into_bytes()),
        (dir.join(&test_file), tests.into_bytes()),
        (root.join(".github/workflows/mesh.yml"), made.github().into_bytes()),
        (root.join(".gitlab-ci.yml"), made.gitlab().into_bytes()),
        (service_dir.join(format!("deploy/{name}.service")), made.systemd().into_bytes()),
        (service_dir.join("deploy/kubernetes.yaml"), made.kubernetes().into_bytes()),
    ]
    .map(|(path, bytes)| Planned { path, bytes });
    let of_mesh = 3;
    if let Some(taken) = planned[..of_mesh].iter().find(|file| file.path.exists()) {
        return Err(Failure::new(format!("`{}` is there already", taken.path.display()))
            .help("move it away, or onboard the service under another `--name`; nothing was written"));
    }
    let (new, kept): (Vec<_>, Vec<_>) = planned.into_iter().partition(|file| !file.path.exists());
    write_all(&new, &mesh_path, &before, &after)?;
    said(&made, &new, &kept, &mesh_path, output)
}

/// A caller that is named says itself that it calls the service; one that is not there is told of later.
fn declares(toml: &mut DocumentMut, caller: &str, name: &ServiceName) {
    let services = toml.get_mut("services").and_then(Item::as_table_like_mut);
    let Some(caller) = services.and_then(|all| all.get_mut(caller)).and_then(Item::as_table_like_mut) else { return };
    let upstreams = caller.entry("upstreams").or_insert(Item::Value(Array::new().into()));
    if let Some(upstreams) = upstreams.as_array_mut()
        && !upstreams.iter().any(|upstream| upstream.as_str() == Some(name.as_str()))
    {
        upstreams.push(name.as_str());
    }
}

fn said(made: &Onboarded<'_>, new: &[Planned], kept: &[Planned], mesh_path: &Path, output: Output) -> Done {
    let shown = |files: &[Planned]| files.iter().map(|file| file.path.display().to_string()).collect::<Vec<_>>();
    let answer = serde_json::json!({
        "service": made.name, "changed": mesh_path, "written": shown(new), "kept": shown(kept), "next": "countersign plan",
    });
    render::answer(output, &answer, |_, paint| {
        let mut text = format!("{} [services.{}] in {}\n", paint.good("~"), made.name, mesh_path.display());
        new.iter().for_each(|file| text.push_str(&format!("{} {}\n", paint.good("+"), file.path.display())));
        kept.iter().for_each(|file| {
            text.push_str(&format!("{} {} is there, and stays as it is\n", paint.warn("="), file.path.display()));
        });
        let left = made.operations.len();
        for (caller, callable) in made.callers.iter().filter(|(_, callable)| !callable.is_said) {
            text.push_str(&format!(
                "{} {caller} may call {} of {left} operations, which only read: take in what else it needs, in policies/{}.cedar\n",
                paint.note("note:"),
                callable.permitted.len(),
                made.name
            ));
        }
        if made.callers.is_empty() {
            text.push_str(&format!("{} nobody calls it yet: name callers with `--caller`\n", paint.warn("note:")));
        }
        text.push_str(&format!(
            "{} `countersign policy test`, then `countersign plan`; in a protected mesh `countersign service show {}` says what is \
             missing until it is let in\n",
            paint.note("next:"),
            made.name
        ));
        text
    })
}

fn could_not(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("could not {what} `{}`", path.display())).because(error).help("nothing was written")
}

fn name_of(arguments: &OnboardArguments, service_dir: &Path) -> Result<ServiceName, Failure> {
    let of_dir = service_dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let given = arguments.name.as_deref().unwrap_or(of_dir);
    ServiceName::parse(given).map_err(|error| {
        Failure::usage(format!("`{}` cannot be the name of a service", render::tame(given)))
            .because(&error)
            .help("give one with `--name`: lower case letters, digits and `-`; nothing was written")
    })
}

fn document_of(arguments: &OnboardArguments, service_dir: &Path) -> Result<PathBuf, Failure> {
    if let Some(given) = &arguments.contract {
        return Ok(given.clone());
    }
    let all = FOLDERS.iter().flat_map(|folder| DOCUMENTS.iter().map(move |name| service_dir.join(folder).join(name)));
    let found: Vec<PathBuf> = all.filter(|path| path.is_file()).collect();
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => Err(Failure::new(format!("no document of operations was found in `{}`", service_dir.display())).help(
            "give the OpenAPI document, or for gRPC the descriptor set (`protoc --descriptor_set_out=descriptor.binpb`), with `--contract`; nothing was written",
        )),
        [one, other, ..] => Err(Failure::new(format!("`{}` and `{}` are both there", one.display(), other.display()))
            .help("say which with `--contract`; nothing was written")),
    }
}

fn protocol_of(document: &Path) -> Result<(Protocol, String), Failure> {
    let extension = document.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension {
        "yaml" | "yml" | "json" => Ok((Protocol::Http, extension.to_owned())),
        "binpb" | "pb" | "desc" => Ok((Protocol::Grpc, extension.to_owned())),
        _ => Err(Failure::usage(format!("`{}` is no document of operations", document.display()))
            .help("an OpenAPI document ends in .yaml, .yml or .json, a descriptor set in .binpb, .pb or .desc")),
    }
}

fn read(document: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    fs::File::open(document)
        .and_then(|file| io::Read::read_to_end(&mut io::Read::take(file, DOCUMENT_BYTES_MAX), &mut bytes))
        .map_err(|error| could_not("read", document, &error))?;
    Ok(bytes)
}

fn parsed(dir: &Path, files: &Files) -> Result<Directory, Failure> {
    directory::parse(files).map_err(|mistakes| {
        let mistakes = mistakes.into_all();
        Failure::new(format!("with that, `{}` would have {}", dir.display(), mistake::count(&mistakes)))
            .mistakes(mistakes)
            .help("correct that, and onboard it again; nothing was written")
    })
}

/// Whether all of it is a mesh directory whose tests hold, those that are new among them.
fn holds(dir: &Path, files: &Files) -> Result<(), Failure> {
    let directory = parsed(dir, files)?;
    let (tested, mistakes) = policy::run_tests(&directory)?;
    if !mistakes.is_empty() {
        return Err(Failure::new("the tests of the mesh directory have mistakes")
            .mistakes(mistakes)
            .help("correct that, and onboard it again; nothing was written"));
    }
    match tested.iter().find(|test| !test.holds) {
        None => Ok(()),
        Some(failed) => Err(Failure::new(format!(
            "with that, the test `{}` of {} would fail",
            failed.name, failed.file
        ))
        .cause(failed.failure.clone().unwrap_or_default())
        .help(
            "another policy decides about the new service too; correct that, and onboard it again; nothing was written",
        )),
    }
}

/// Who calls it: whom the command line names, and services that declare it as an upstream.
fn callers_of(
    arguments: &OnboardArguments,
    directory: &Directory,
    name: &ServiceName,
    operations: &[Operation],
) -> Result<BTreeMap<ServiceName, Callable>, Failure> {
    let reading = || operations.iter().filter(|operation| only_reads(operation)).cloned().collect::<Vec<_>>();
    let declaring = directory.services.iter().filter(|(_, service)| service.spec.upstreams.contains(name));
    let mut callers: BTreeMap<ServiceName, Callable> =
        declaring.map(|(caller, _)| (caller.clone(), Callable { permitted: reading(), is_said: false })).collect();
    for given in &arguments.caller {
        let (caller, wanted) =
            given.split_once('=').map_or((given.as_str(), None), |(caller, ops)| (caller, Some(ops)));
        let known = directory.services.keys().find(|known| known.as_str() == caller && *known != name);
        let Some(caller) = known else {
            let names: Vec<&str> = directory.services.keys().map(ServiceName::as_str).collect();
            return Err(Failure::usage(format!("`{}` is no other service of mesh.toml", render::tame(caller)))
                .help(format!("its services are: {}; nothing was written", names.join(", "))));
        };
        let permitted = match wanted {
            None => reading(),
            Some(wanted) => wanted.split(',').map(|one| named(operations, one)).collect::<Result<_, _>>()?,
        };
        callers.insert(caller.clone(), Callable { permitted, is_said: wanted.is_some() });
    }
    Ok(callers)
}

fn named(operations: &[Operation], wanted: &str) -> Result<Operation, Failure> {
    operations.iter().find(|operation| &*operation.name == wanted).cloned().ok_or_else(|| {
        let names: BTreeSet<&str> = operations.iter().map(|operation| &*operation.name).take(30).collect();
        Failure::usage(format!("`{}` is no operation of the contract", render::tame(wanted))).help(format!(
            "its operations are: {}; nothing was written",
            names.into_iter().collect::<Vec<_>>().join(", ")
        ))
    })
}

/// Whether an operation says of itself that it changes nothing: a safe method (RFC 9110, 9.2.1), or a standard method of the
/// Google API guide that only reads (AIP-131, AIP-132).
fn only_reads(operation: &Operation) -> bool {
    let method = operation.name.rsplit('/').next().unwrap_or_default();
    let is_rpc = operation.path.trim_start_matches('/') == &*operation.name;
    match &*operation.method {
        "GET" | "HEAD" => true,
        "POST" if is_rpc => ["Get", "List", "BatchGet"].iter().any(|standard| method.starts_with(standard)),
        _ => false,
    }
}

/// The repository that holds the mesh directory; the directory itself where it is in none.
fn repository_of(dir: &Path) -> PathBuf {
    dir.ancestors().find(|above| above.join(".git").exists()).unwrap_or(dir).to_owned()
}

/// Writes all of them, then the table; takes back what was written when one cannot be.
fn write_all(files: &[Planned], mesh_path: &Path, before: &str, after: &str) -> Result<(), Failure> {
    let mut written: Vec<&Path> = Vec::new();
    let mut all = || -> Result<(), (PathBuf, io::Error)> {
        for file in files {
            let failed = |error| (file.path.clone(), error);
            if let Some(folder) = file.path.parent() {
                fs::create_dir_all(folder).map_err(failed)?;
            }
            let mut new = fs::File::create_new(&file.path).map_err(failed)?;
            written.push(&file.path);
            io::Write::write_all(&mut new, &file.bytes).and_then(|()| new.sync_all()).map_err(failed)?;
        }
        declare::replace(mesh_path, before, after).map_err(|error| (mesh_path.to_owned(), error))
    };
    all().map_err(|(path, error)| {
        written.iter().for_each(|path| drop(fs::remove_file(path)));
        could_not("write", &path, &error)
    })
}

#[cfg(test)]
mod tests;
