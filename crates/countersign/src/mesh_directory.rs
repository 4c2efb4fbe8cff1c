//! Reads the files of a mesh directory into memory, where the law parses them. Knows their names, not their meaning.

use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use countersign_core::{
    change::{Bodies, Revision},
    contract::DOCUMENT_BYTES_MAX,
    directory::{self, Directory, FILE_BYTES_MAX, Files, MESH_FILE, Mistake},
    state::MeshState,
};

use crate::{error::Failure, mistake};

/// The folders below a mesh directory that hold files of it.
pub const FOLDERS: [&str; 4] = ["policies", "gate", "tests", "contracts"];
/// Files of one mesh directory at most.
const FILES_MAX: usize = 10_000;

/// Reads and parses the mesh directory `dir`. Every mistake in it is told at once.
pub fn load(dir: &Path) -> Result<Directory, Failure> {
    let (files, mut mistakes) = read(dir)?;
    match directory::parse(&files) {
        Ok(directory) if mistakes.is_empty() => Ok(directory),
        parsed => {
            mistakes.extend(parsed.err().into_iter().flat_map(directory::Mistakes::into_all));
            Err(Failure::new(format!("`{}` has {}", dir.display(), mistake::count(&mistakes))).mistakes(mistakes))
        }
    }
}

/// The text of every file that the mesh directory consists of, and what cannot be text.
pub fn read(dir: &Path) -> Result<(Files, Vec<Mistake>), Failure> {
    read_with(dir, None)
}

/// As [`read`], with another text in place of that of `mesh.toml`.
pub fn read_with(dir: &Path, mesh_toml: Option<&str>) -> Result<(Files, Vec<Mistake>), Failure> {
    let could_not = |path: &Path, e: &io::Error| {
        Failure::new(format!("could not read `{}`", path.display()))
            .because(e)
            .help("every file of a mesh directory must be readable")
    };
    let mut paths: Vec<PathBuf> = Vec::new();
    for folder in std::iter::once("").chain(FOLDERS) {
        let folder = dir.join(folder);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound && folder != dir => continue,
            Err(e) => return Err(could_not(&folder, &e)),
        };
        for entry in entries {
            paths.push(entry.map_err(|e| could_not(&folder, &e))?.path());
        }
    }
    let (mut files, mut mistakes) = (Files::new(), Vec::new());
    for path in paths {
        let Some(name) = path.strip_prefix(dir).ok().and_then(Path::to_str).filter(|name| directory::is_read(name))
        else {
            continue;
        };
        if files.len() == FILES_MAX {
            return Err(Failure::new(format!("`{}` has more than {FILES_MAX} files", dir.display()))
                .help("a file can hold many policies"));
        }
        match text(&path).map_err(|e| could_not(&path, &e))? {
            Ok(text) => {
                files.insert(name.to_owned(), text);
            }
            Err(no_text) => mistakes.push(unreadable(name, no_text)),
        }
    }
    files.extend(mesh_toml.map(|text| (MESH_FILE.to_owned(), text.to_owned())));
    let contracts = files.get(MESH_FILE).map(|text| directory::contract_files(text)).unwrap_or_default();
    for name in contracts {
        let path = dir.join(&name);
        match contract(&path, directory::is_descriptor_set(&name)) {
            Ok(read) => {
                mistakes.extend(read.no_text.map(|no_text| unreadable(&name, no_text)));
                files.insert(name, read.text);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {} // told where it is named
            Err(e) => return Err(could_not(&path, &e)),
        }
    }
    Ok((files, mistakes))
}

fn unreadable(name: &str, (what, help): NoText) -> Mistake {
    let what = format!("`{name}` {what}");
    Mistake { file: name.into(), text: "".into(), span: 0..0, what, help: Some(help.to_owned()) }
}

/// A contract as the law takes it, and why it is no text although it should be.
struct Contract {
    text: String,
    no_text: Option<NoText>,
}

/// Reads a byte more than a contract may have: the law says that it is too long.
fn contract(path: &Path, is_descriptor_set: bool) -> io::Result<Contract> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(DOCUMENT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    if is_descriptor_set {
        return Ok(Contract { text: BASE64_STANDARD.encode(bytes), no_text: None });
    }
    Ok(match String::from_utf8(bytes) {
        Ok(text) => Contract { text, no_text: None },
        Err(error) => Contract {
            text: String::from_utf8_lossy(error.as_bytes()).into_owned(),
            no_text: (error.as_bytes().len() <= DOCUMENT_BYTES_MAX).then_some(NOT_UTF8),
        },
    })
}

/// A document as the law takes it under this name.
pub fn contract_text(name: &str, bytes: &[u8]) -> String {
    match directory::is_descriptor_set(name) {
        true => BASE64_STANDARD.encode(bytes),
        false => String::from_utf8_lossy(bytes).into_owned(),
    }
}

type NoText = (&'static str, &'static str);
const NOT_UTF8: NoText = ("is not UTF-8 text", "save it as UTF-8");

fn text(path: &Path) -> io::Result<Result<String, NoText>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > FILE_BYTES_MAX {
        return Ok(Err(("is too long to be read", "split it")));
    }
    Ok(String::from_utf8(bytes).map_err(|_| NOT_UTF8))
}

/// The mesh that the directory describes, as if it were applied to an empty one.
pub fn state(directory: &Directory) -> (MeshState, Bodies) {
    let empty = MeshState::default();
    let plan =
        directory::plan(directory, &empty, Revision::default()).expect("an empty mesh has no other trust domain");
    let state = empty.apply_all(&plan.change_set).expect("INVARIANT: a plan folds on the state it was made for");
    (state, plan.bodies)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::{Output, Paint};

    fn written(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn every_mistake_is_told_at_once_with_its_line_and_a_caret() {
        let root = written(&[
            ("mesh.toml", b"trust_domain = \"shop.example\"\n[services.web]\nrunn = [\"x\"]\n"),
            ("policies/a.cedar", b"permit (principal, action resource);"),
            ("policies/latin1.cedar", b"// caf\xe9\n"),
        ]);
        let failure = load(root.path()).unwrap_err();
        let text = failure.render(Output::Text, Paint::plain());
        for part in ["mesh.toml:3:1", "runn", "policies/a.cedar:1:", "`policies/latin1.cedar` is not UTF-8 text", "───"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json: serde_json::Value = serde_json::from_str(&failure.render(Output::Json, Paint::plain())).unwrap();
        assert!(json["mistakes"].as_array().unwrap().len() >= 3, "{json}");
    }

    #[test]
    fn the_contracts_that_services_name_are_read_and_no_other_file() {
        let mesh = b"trust_domain = \"shop.example\"\n[services]\n\
            a = { port = 1, contract = \"a.yaml\" }\n\
            b = { port = 2, protocol = \"grpc\", contract = \"api/b.binpb\" }\n\
            c = { port = 3, contract = \"c.json\" }\n";
        let openapi = b"openapi: 3.0.0\npaths: { /a: { get: {} } }\n";
        let set = b"\x0a\x0d\x32\x0b\x0a\x01S\x12\x06\x0a\x01M\x12\x01A";
        let root =
            written(&[("mesh.toml", mesh), ("a.yaml", openapi), ("api/b.binpb", set), ("c.json", b"{\"a\":\"\xff\"}")]);
        fs::write(root.path().join("other.yaml"), b"nonsense: [").unwrap();
        let (files, mistakes) = read(root.path()).unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["a.yaml", "api/b.binpb", "c.json", "mesh.toml"]);
        assert_eq!(mistakes.iter().map(|mistake| &*mistake.what).collect::<Vec<_>>(), ["`c.json` is not UTF-8 text"]);
        fs::write(root.path().join("c.json"), br#"{"openapi":"3.1.0","paths":{"/c":{"put":{}}}}"#).unwrap();
        let directory = load(root.path()).unwrap();
        let operations = directory.services.values().filter_map(|service| service.contract.as_ref());
        let names: Vec<_> = operations.map(|contract| contract.operations()[0].name.to_string()).collect();
        assert_eq!(names, ["GET /a", "S/M", "PUT /c"]);
        let long = vec![b' '; DOCUMENT_BYTES_MAX + 10];
        fs::write(root.path().join("c.json"), long).unwrap();
        let failure = load(root.path()).unwrap_err().render(Output::Text, Paint::plain());
        assert!(failure.contains("the document has more than 1048576 bytes"), "{failure}");
    }

    #[test]
    fn the_data_directory_and_other_files_are_passed_over() {
        let root = written(&[
            ("mesh.toml", b"trust_domain = \"shop.example\"\n"),
            (".countersign/policies/a.cedar", b"nonsense"),
            ("policies/a.cedar.swp", b"\xff\xfe"),
            ("policies/deep/b.cedar", b"nonsense"),
        ]);
        assert_eq!(load(root.path()).unwrap().policies.len(), 0);
    }
}
