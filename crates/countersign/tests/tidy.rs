//! Keeps the house in the shape that the documents claim: invariants tied to proofs, crates that do not see each other,
//! files that say what they are for. It never measures length.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn rust_files() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("crates")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|ext| ext == "rs") {
                let text = fs::read_to_string(&entry).unwrap();
                found.push((entry.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

/// The names in `MARK (name)`, with the files they stand in.
fn marked(mark: &str) -> BTreeMap<String, BTreeSet<PathBuf>> {
    let mut found: BTreeMap<String, BTreeSet<PathBuf>> = BTreeMap::new();
    let opening = format!("{mark} (");
    for (file, text) in rust_files().into_iter().filter(|(file, _)| !file.ends_with("tests/tidy.rs")) {
        for rest in text.split(&opening).skip(1) {
            let name = rest.split(')').next().unwrap_or_default().to_owned();
            found.entry(name).or_default().insert(file.clone());
        }
    }
    found
}

#[test]
fn every_invariant_has_a_row_and_a_proof() {
    let document = fs::read_to_string(root().join("docs/invariants.md")).unwrap();
    let rows: BTreeSet<String> =
        document.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next().map(str::to_owned)).collect();
    let claimed: BTreeSet<String> = marked("INVARIANT").into_keys().collect();
    let proved: BTreeSet<String> = marked("PROVES").into_keys().collect();
    assert_eq!(claimed, rows, "left: INVARIANT (name) in the code; right: rows of docs/invariants.md");
    assert_eq!(proved, rows, "left: PROVES (name) on a test; right: rows of docs/invariants.md");
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent: Vec<_> = rust_files()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//! ") || text.starts_with("//! .\n"))
        .map(|(file, _)| file)
        .collect();
    assert!(silent.is_empty(), "these files do not open with `//!` and a sentence: {silent:?}");
}

#[test]
fn no_room_is_named_after_nothing() {
    let nothing = ["utils", "util", "common", "helpers", "helper", "manager", "misc"];
    let badly: Vec<_> = rust_files()
        .into_iter()
        .map(|(file, _)| file)
        .filter(|file| {
            file.components().any(|part| nothing.contains(&part.as_os_str().to_string_lossy().trim_end_matches(".rs")))
        })
        .collect();
    assert!(badly.is_empty(), "{badly:?}");
}

#[test]
fn control_proxy_and_agent_meet_only_in_api() {
    for (crate_name, never) in [
        ("countersign-core", &["countersign-api", "tokio", "rusqlite", "hyper"][..]),
        ("countersign-api", &["countersign-control", "countersign-proxy", "countersign-agent"]),
        ("countersign-control", &["countersign-proxy", "countersign-agent"]),
        ("countersign-agent", &["countersign-proxy", "countersign-control", "rusqlite"]),
        // rcgen is what signs: without it the enforcement point has no code to issue an identity with.
        ("countersign-proxy", &["countersign-control", "countersign-agent", "rcgen", "rusqlite"]),
    ] {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--offline", "--prefix", "none", "--edges", "normal", "--format", "{p}", "-p", crate_name])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let tree = String::from_utf8(output.stdout).unwrap();
        let inside: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
        let found: Vec<_> = never.iter().filter(|name| inside.contains(**name)).collect();
        assert!(found.is_empty(), "{crate_name} must not contain {found:?}");
    }
}
