//! The contracts that `mesh.toml` names: which files they are, and what stands in them.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use toml::de::DeTable;

use super::{
    Files,
    read::{At, Source, Table, shortened},
};
use crate::{
    contract::{Contract, Syntax, read_descriptor_set, read_openapi},
    policy::Mistake,
    service::Protocol,
};

/// In place of a path: the service has no contract, on purpose.
const NONE: &str = "none";
/// Longest path of a contract, in bytes.
const PATH_BYTES_MAX: usize = 255;

/// Contracts as services name them; each file is read once, whoever names it.
pub(super) struct Contracts<'f> {
    files: &'f Files,
    read: RefCell<BTreeMap<String, (Source, Option<Contract>)>>,
}

/// What a file holds, as its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    OpenApi(Syntax),
    DescriptorSet,
}

/// The contracts that `mesh_toml` names, as far as it can be read: the files below the mesh directory that
/// [`parse`](super::parse) wants beside those of [`is_read`](super::is_read).
pub fn contract_files(mesh_toml: &str) -> BTreeSet<String> {
    let (document, _) = DeTable::parse_recoverable(mesh_toml);
    let services = document.get_ref().get("services").and_then(|services| services.get_ref().as_table());
    let named = services.into_iter().flat_map(|services| services.values()).filter_map(|service| {
        let path = service.get_ref().as_table()?.get("contract")?.get_ref().as_str()?;
        (is_below(path) && format_of(path).is_some()).then(|| path.to_owned())
    });
    named.collect()
}

/// Whether the file at `path` is a descriptor set, which is no text.
pub fn is_descriptor_set(path: &str) -> bool {
    format_of(path) == Some(Format::DescriptorSet)
}

impl<'f> Contracts<'f> {
    pub(super) fn new(files: &'f Files) -> Self {
        Self { files, read: RefCell::default() }
    }

    /// The contract of the service that `table` describes. What is wrong with it is told of the file that it stands in.
    pub(super) fn of(&self, table: &Table<'_>, protocol: Protocol) -> Option<Contract> {
        let At { at, value: path } = table.string("contract")?;
        if path == NONE && protocol.has_operations() {
            return None;
        }
        let refuse = |what: String, help: &str| {
            table.mistake(at.clone(), what, help);
            None
        };
        if !is_below(path) {
            let what = format!("`{}` is not a file of the mesh directory", shortened(path));
            return refuse(what, "give its path below the directory of mesh.toml: \"contracts/payments.yaml\"");
        }
        let wanted = match (protocol, format_of(path)) {
            (Protocol::Tcp, _) => return refuse("a tcp service has no operations".into(), "leave `contract` out"),
            (Protocol::Http, Some(Format::OpenApi(_))) | (Protocol::Grpc, Some(Format::DescriptorSet)) => None,
            (Protocol::Http, _) => Some("the contract of an http service is an OpenAPI document: .yaml, .yml or .json"),
            (Protocol::Grpc, _) => Some("the contract of a grpc service is a descriptor set: .binpb, .pb or .desc"),
        };
        if let Some(help) = wanted {
            return refuse(
                format!("`{}` cannot be the contract of a service that speaks {protocol}", shortened(path)),
                help,
            );
        }
        let Some(text) = self.files.get(path) else {
            return refuse(
                format!("there is no file `{}`", shortened(path)),
                "its path is below the directory of mesh.toml",
            );
        };
        let mut read = self.read.borrow_mut();
        let (_, contract) = read.entry(path.to_owned()).or_insert_with(|| read_file(path, text));
        contract.clone()
    }

    /// Whether the service that `table` describes says that it has none.
    pub(super) fn is_waived(table: &Table<'_>) -> bool {
        table.get("contract").is_some_and(|given| given.get_ref().as_str() == Some(NONE))
    }

    /// The files that were read, with their mistakes.
    pub(super) fn into_sources(self) -> impl Iterator<Item = Source> {
        self.read.into_inner().into_values().map(|(source, _)| source)
    }
}

fn read_file(path: &str, text: &str) -> (Source, Option<Contract>) {
    let (shown, read) = match format_of(path) {
        Some(Format::OpenApi(syntax)) => (text, read_openapi(text, syntax)),
        _ => ("", read_base64(text)),
    };
    let source = Source::new(path, shown);
    let contract = read.map_err(|mistakes| mistakes.into_iter().for_each(|mistake| source.take(mistake))).ok();
    (source, contract)
}

fn read_base64(text: &str) -> Result<Contract, Vec<Mistake>> {
    let bytes = BASE64_STANDARD.decode(text).map_err(|error| {
        vec![Mistake { span: 0..0, what: format!("the descriptor set did not come as base64: {error}"), help: None }]
    })?;
    read_descriptor_set(&bytes)
}

fn format_of(path: &str) -> Option<Format> {
    let (_, kind) = path.rsplit_once('.')?;
    match kind {
        "yaml" | "yml" => Some(Format::OpenApi(Syntax::Yaml)),
        "json" => Some(Format::OpenApi(Syntax::Json)),
        "binpb" | "pb" | "desc" => Some(Format::DescriptorSet),
        _ => None,
    }
}

/// Whether `path` leads to a file below the directory, and to the same one on every system.
fn is_below(path: &str) -> bool {
    let odd = |c: char| c.is_control() || matches!(c, '\\' | ':');
    path.len() <= PATH_BYTES_MAX
        && !path.contains(odd)
        && path.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}
