//! `routes.toml`: a parsed directory has a plan that folds and leads to it; a mistake lies within its file.
#![no_main]

use countersign_core::{
    change::Revision,
    directory::{Files, parse, plan},
    state::MeshState,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let mut files = Files::new();
    files.insert("mesh.toml".into(), include_str!("../seeds/mesh_toml/example").into());
    files.insert("routes.toml".into(), text.into());
    match parse(&files) {
        Err(mistakes) => {
            for mistake in mistakes.all() {
                assert!(mistake.span.end <= mistake.text.len(), "{mistake:?}");
                mistake.position();
            }
        }
        Ok(directory) => {
            let first = plan(&directory, &MeshState::default(), Revision(0)).unwrap();
            let state = MeshState::default().apply_all(&first.change_set).expect("a plan folds");
            assert!(plan(&directory, &state, Revision(1)).unwrap().is_empty());
        }
    }
});
