//! `service declare`: a new service in `mesh.toml`, beside what stands there, comments and all. It changes the file and nothing else:
//! what that means for the mesh, `plan` shows and `apply` asks for.

use std::{
    fs, io,
    io::Write,
    path::{Component, Path},
};

use clap::Args;
use countersign_core::{
    directory::{self, MESH_FILE},
    identity::ServiceName,
    service::Protocol,
};
use toml_edit::{Array, DocumentMut, Item, Table, value};

use crate::{
    error::{Done, Failure},
    mesh_directory,
    mesh_finder::Place,
    mistake,
    render::{self, Output},
};

/// What a new service is.
#[derive(Debug, Args)]
pub struct DeclareArguments {
    /// Its name: a DNS label
    name: String,
    /// What it speaks: `http`, `grpc` or `tcp`
    #[arg(long, default_value = "http", value_parser = protocol)]
    protocol: Protocol,
    /// Where it listens on 127.0.0.1; not needed for what the mesh starts
    #[arg(long)]
    port: Option<u16>,
    /// The port that its callers use, with `NAME.mesh`
    #[arg(long, value_name = "PORT")]
    mesh_port: Option<u16>,
    /// The file of its contract, in the mesh directory; `none` if it has none on purpose
    #[arg(long, value_name = "FILE")]
    contract: Option<String>,
    /// The class of the data it holds, for policies
    #[arg(long, value_name = "NAME")]
    sensitivity: Option<String>,
    /// Groups services, for policies
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// The services it calls
    #[arg(long, value_name = "SERVICE", value_delimiter = ',')]
    upstreams: Vec<String>,
    /// What starts it; without, it runs already and listens at `--port`
    #[arg(last = true, value_name = "COMMAND")]
    run: Vec<String>,
}

impl DeclareArguments {
    /// A service that is started by `run` and listens at `port`.
    pub fn of(
        name: &str,
        protocol: Protocol,
        port: u16,
        (namespace, sensitivity): (Option<String>, Option<String>),
        run: Vec<String>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            protocol,
            port: Some(port),
            mesh_port: None,
            contract: None,
            sensitivity,
            namespace,
            upstreams: Vec::new(),
            run,
        }
    }
}

fn protocol(given: &str) -> Result<Protocol, String> {
    match given {
        "http" => Ok(Protocol::Http),
        "grpc" => Ok(Protocol::Grpc),
        "tcp" => Ok(Protocol::Tcp),
        _ => Err("it is `http`, `grpc` or `tcp`".to_owned()),
    }
}

/// Writes it, unless what came of it would not be a mesh directory.
pub fn declare(arguments: &DeclareArguments, place: &Place, output: Output) -> Done {
    let dir = place.dir()?;
    let path = dir.join(MESH_FILE);
    let could_not = |what: &str, error: &io::Error| {
        Failure::new(format!("could not {what} `{}`", path.display()))
            .because(error)
            .help("the file, and room beside it, must be yours; nothing was written")
    };
    let name = ServiceName::parse(&arguments.name).map_err(|error| {
        Failure::usage(format!("`{}` cannot be the name of a service", arguments.name))
            .because(&error)
            .help("use lower case letters, digits and `-`: `order-history`; nothing was written")
    })?;
    let before = fs::read_to_string(&path).map_err(|error| could_not("read", &error))?;
    let mut document: DocumentMut = before.parse().map_err(|error| {
        Failure::new(format!("`{}` cannot be read", path.display()))
            .because(&error as &toml_edit::TomlError)
            .help("`countersign plan` shows where; nothing was written")
    })?;
    let contract = arguments.contract.as_deref().map(|given| contract_below(dir, given)).transpose()?;
    add(&mut document, &name, arguments, contract.as_deref())?;
    let after = document.to_string();
    let (files, mut mistakes) = mesh_directory::read_with(dir, Some(&after))?;
    mistakes.extend(directory::parse(&files).err().into_iter().flat_map(directory::Mistakes::into_all));
    if !mistakes.is_empty() {
        return Err(Failure::new(format!("with that, `{}` would have {}", dir.display(), mistake::count(&mistakes)))
            .mistakes(mistakes)
            .help("correct that, and declare it again; nothing was written"));
    }
    replace(&path, &before, &after).map_err(|error| could_not("write", &error))?;
    let answer = serde_json::json!({ "service": name, "file": path, "next": "countersign apply" });
    render::answer(output, &answer, |_, paint| {
        format!(
            "{} [services.{name}] in {}\n{} `countersign plan` shows what it changes, `countersign apply` asks for it; in a protected mesh \
             `countersign service show {name}` then says what is missing until it can be let in\n",
            paint.good("+"),
            path.display(),
            paint.note("help:"),
        )
    })
}

/// Adds its table behind the last one of a service.
pub fn add(
    document: &mut DocumentMut,
    name: &ServiceName,
    arguments: &DeclareArguments,
    contract: Option<&str>,
) -> Result<(), Failure> {
    let services = document.entry("services").or_insert_with(|| {
        let mut services = Table::new();
        services.set_implicit(true);
        Item::Table(services)
    });
    let is_inline = services.is_inline_table();
    let services = services.as_table_like_mut().ok_or_else(|| {
        Failure::new(format!("`services` of `{MESH_FILE}` is no table"))
            .help("`countersign plan` shows where; nothing was written")
    })?;
    if services.contains_key(name.as_str()) {
        return Err(Failure::new(format!("service `{name}` is declared already"))
            .help(format!("change its table [services.{name}] in `{MESH_FILE}`; nothing was written")));
    }
    let mut table = Table::new();
    let array = |words: &[String]| value(words.iter().map(String::as_str).collect::<Array>());
    let port = |port: u16| value(i64::from(port));
    let mut put = |key: &str, item: Option<Item>| item.map(|item| table.insert(key, item));
    put("run", (!arguments.run.is_empty()).then(|| array(&arguments.run)));
    put("port", arguments.port.map(port));
    put("protocol", (arguments.protocol != Protocol::Http).then(|| value(arguments.protocol.to_string())));
    put("mesh_port", arguments.mesh_port.map(port));
    put("upstreams", (!arguments.upstreams.is_empty()).then(|| array(&arguments.upstreams)));
    put("contract", contract.map(value));
    put("namespace", arguments.namespace.as_deref().map(value));
    put("sensitivity", arguments.sensitivity.as_deref().map(value));
    let item = if is_inline { value(table.into_inline_table()) } else { Item::Table(table) };
    services.insert(name.as_str(), item);
    Ok(())
}

/// The path of a contract as `mesh.toml` has it, of one that is given from where the command runs or from the mesh directory.
fn contract_below(dir: &Path, given: &str) -> Result<String, Failure> {
    if given == "none" {
        return Ok(given.to_owned());
    }
    let outside = || {
        Failure::new(format!("the contract `{given}` is no file below `{}`", dir.display()))
            .help("copy it into the folder `contracts` there, and name it from there; nothing was written")
    };
    let found = [dir.join(given), Path::new(given).to_path_buf()].into_iter().find_map(|path| path.canonicalize().ok());
    let found = found.ok_or_else(outside)?;
    let below = found.strip_prefix(dir).map_err(|_| outside())?;
    let parts = below.components().map(|part| match part {
        Component::Normal(part) => part.to_str(),
        _ => None,
    });
    Ok(parts.collect::<Option<Vec<_>>>().ok_or_else(outside)?.join("/"))
}

/// Puts `after` in the place of what was `before`, whole or not at all.
pub fn replace(path: &Path, before: &str, after: &str) -> io::Result<()> {
    let next = path.with_extension("toml.new");
    let written = (|| {
        let mut file = fs::File::create_new(&next)?;
        file.set_permissions(fs::metadata(path)?.permissions())?;
        file.write_all(after.as_bytes())?;
        file.sync_all()?;
        if fs::read_to_string(path)? != before {
            return Err(io::Error::other("somebody else changed it in the same moment: declare it again"));
        }
        fs::rename(&next, path)
    })();
    match &written {
        // Another one is being written, or was left behind.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(_) => drop(fs::remove_file(&next)),
        Ok(()) => {}
    }
    written
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::render::Paint;

    const MESH: &str = "\
# Our mesh.
trust_domain = \"tiny.example\"   # for life

[services.web]                      # the first
run = [\"python3\", \"web.py\"]

[defaults]                          # stands behind
workers = 2
";

    fn arguments(name: &str) -> DeclareArguments {
        DeclareArguments {
            name: name.into(),
            protocol: Protocol::Http,
            port: Some(9000),
            mesh_port: None,
            contract: None,
            sensitivity: None,
            namespace: None,
            upstreams: Vec::new(),
            run: Vec::new(),
        }
    }

    fn mesh(text: &str) -> (tempfile::TempDir, Place) {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(MESH_FILE), text).unwrap();
        let dir = root.path().canonicalize().unwrap();
        let place = Place { data_dir: dir.join(".countersign"), dir: Some(dir), dashboard: None };
        (root, place)
    }

    #[test]
    fn a_service_is_added_and_every_other_byte_stays() {
        let (root, place) = mesh(MESH);
        fs::create_dir(root.path().join("contracts")).unwrap();
        let contract =
            "openapi: 3.1.0\ninfo: { title: t, version: v }\npaths: { /charges: { post: { operationId: charge } } }\n";
        fs::write(root.path().join("contracts/pay.yaml"), contract).unwrap();
        let declared = DeclareArguments {
            contract: Some("contracts/pay.yaml".into()),
            sensitivity: Some("pci".into()),
            upstreams: vec!["web".into()],
            port: None,
            run: vec!["./pay".into(), "--quiet".into()],
            ..arguments("pay")
        };
        declare(&declared, &place, Output::Json).unwrap();
        declare(&DeclareArguments { contract: Some("none".into()), ..arguments("page") }, &place, Output::Json)
            .unwrap();
        expect![[r#"
            # Our mesh.
            trust_domain = "tiny.example"   # for life

            [services.web]                      # the first
            run = ["python3", "web.py"]

            [services.pay]
            run = ["./pay", "--quiet"]
            upstreams = ["web"]
            contract = "contracts/pay.yaml"
            sensitivity = "pci"

            [services.page]
            port = 9000
            contract = "none"

            [defaults]                          # stands behind
            workers = 2
        "#]]
        .assert_eq(&fs::read_to_string(root.path().join(MESH_FILE)).unwrap());
    }

    #[test]
    fn what_would_be_no_mesh_directory_is_refused_with_what_to_do_and_nothing_is_written() {
        let with = |change: fn(&mut DeclareArguments)| {
            let mut changed = arguments("pay");
            change(&mut changed);
            changed
        };
        for (case, text, arguments, said) in [
            ("a bad name", MESH, arguments("Pay_1"), "cannot be the name of a service"),
            ("one that is there", MESH, arguments("web"), "is declared already"),
            ("neither port nor command", MESH, with(|a| a.port = None), "neither `run` nor `port`"),
            ("no such contract", MESH, with(|a| a.contract = Some("no.yaml".into())), "is no file below"),
            ("a contract elsewhere", MESH, with(|a| a.contract = Some("/etc/hostname".into())), "is no file below"),
            (
                "a contract that is none",
                MESH,
                with(|a| a.contract = Some("mesh.toml".into())),
                "cannot be the contract",
            ),
            ("an upstream that is nobody", MESH, with(|a| a.upstreams = vec!["x".into()]), "there is no service `x`"),
            ("a file that is no TOML", "trust_domain = ", arguments("pay"), "cannot be read"),
            ("services that are no table", "trust_domain = \"a.b\"\nservices = 1\n", arguments("pay"), "is no table"),
        ] {
            let (root, place) = mesh(text);
            let refused = declare(&arguments, &place, Output::Json).unwrap_err().render(Output::Text, Paint::plain());
            assert!(refused.contains(said) && refused.contains("help:"), "{case}: {refused}");
            assert_eq!(fs::read_to_string(root.path().join(MESH_FILE)).unwrap(), text, "{case}");
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "{case}: nothing is left behind");
        }
    }
}
