//! The examples of docs/policy.md hold: each is parsed as a mesh directory, tested by the answers written beside it, and
//! clean under lint.

use countersign_core::{
    change::Revision,
    directory,
    policy::{Library, lint, parse_cases, run_cases},
    state::MeshState,
};

const DOCUMENT: &str = include_str!("../../../docs/policy.md");

/// The fenced blocks of the document: what stands after the fence, and the text.
fn blocks() -> Vec<(&'static str, &'static str)> {
    DOCUMENT
        .split("\n```")
        .skip(1)
        .step_by(2)
        .map(|block| block.split_once('\n').expect("a fence ends its line"))
        .collect()
}

#[test]
fn every_example_of_the_document_holds() {
    let blocks = blocks();
    let named = |name: &str| blocks.iter().find(|(fence, _)| *fence == name).expect("the mesh of the examples").1;
    let (mesh, roles) = (named("toml mesh"), named("toml roles"));
    let examples: Vec<_> =
        blocks.windows(2).filter(|pair| pair[0].0 == "cedar").map(|pair| (pair[0].1, pair[1])).collect();
    assert!(examples.len() >= 12, "{} examples", examples.len());
    for (cedar, (fence, tests)) in examples {
        assert_eq!(fence, "toml", "the answers stand right below\n{cedar}");
        let files: directory::Files = [("mesh.toml", mesh), ("roles.toml", roles), ("policies/example.cedar", cedar)]
            .into_iter()
            .map(|(path, text)| (path.to_owned(), text.to_owned()))
            .collect();
        let directory = directory::parse(&files).unwrap_or_else(|mistakes| panic!("{mistakes:?}\n{cedar}"));
        let plan = directory::plan(&directory, &MeshState::default(), Revision::default()).expect("a new mesh");
        let state = MeshState::default().apply_all(&plan.change_set).expect("a plan folds");
        let mut library = Library::default();
        for (digest, text) in plan.bodies.iter() {
            library.insert(*digest, text).expect("a directory's policies parse");
        }
        let cases = parse_cases(tests, &state).unwrap_or_else(|mistakes| panic!("{mistakes:#?}\n{tests}"));
        assert!(cases.len() >= 2, "an example shows what is permitted and what is not\n{cedar}");
        for result in run_cases(&cases, &state, &library).expect("the law compiles") {
            assert_eq!(result.failure, None, "{}\n{cedar}", cases[result.case].name);
        }
        assert_eq!(lint(&state, &library), [], "{cedar}");
    }
}
