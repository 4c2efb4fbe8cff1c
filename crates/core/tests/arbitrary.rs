//! Arbitrary bytes at every parser of untrusted bytes in the law: nothing panics, and what is refused says where. The targets in
//! `fuzz/` do the same with a nightly compiler and coverage as the guide.

use countersign_core::{
    canonical::Digest,
    change::{Bodies, ChangeSet, Revision},
    directory::{Files, is_read, parse, plan},
    identity::{InstanceId, ServiceName, SpiffeId, TrustDomain},
    ledger::{Batch, Entry, Follower, Snapshot},
    path::{Authority, NormalPath},
    policy,
    state::MeshState,
};
use proptest::prelude::*;

const MESH: &str = include_str!("mesh/mesh.toml");
const PAYMENTS: &str = include_str!("mesh/payments.yaml");
const ROLES: &str = include_str!("mesh/roles.toml");
const ROUTES: &str = include_str!("mesh/routes.toml");
const POLICY: &str = "@id(\"reads\")\npermit (principal in Role::\"checkout\", action in [Action::\"http:GET\"], \
                      resource in Service::\"catalog\") when { context.request.path like \"/items/*\" };\n";

/// A good text with a few bytes of it cut, doubled or replaced: it gets deeper into a parser than noise does.
fn near(good: &'static str) -> impl Strategy<Value = String> {
    let edit = (any::<prop::sample::Index>(), 0..12usize, "[ -~\\n\"=\\[\\]{}]{0,6}|.");
    prop::collection::vec(edit, 1..4).prop_map(move |edits| {
        let mut chars: Vec<char> = good.chars().collect();
        for (at, cut, text) in edits {
            let at = at.index(chars.len() + 1);
            let end = (at + cut).min(chars.len());
            chars.splice(at..end, text.chars());
        }
        chars.into_iter().collect()
    })
}

fn file_text(good: &'static str) -> impl Strategy<Value = String> {
    prop_oneof![4 => near(good), 1 => any::<String>(), 1 => "[ -~\\n]{0,80}"]
}

proptest! {
    #[test]
    fn a_mesh_directory_of_any_text_is_parsed_or_refused_in_places(
        mesh in file_text(MESH), roles in file_text(ROLES), routes in file_text(ROUTES), cedar in file_text(POLICY), which in 0..16u8,
    ) {
        let pick = |bit: u8, given: String, good: &str| if which & bit != 0 { given } else { good.to_owned() };
        let files: Files = [
            ("mesh.toml", pick(1, mesh, MESH)),
            ("roles.toml", pick(2, roles, ROLES)),
            ("routes.toml", pick(4, routes, ROUTES)),
            ("policies/all.cedar", pick(8, cedar, POLICY)),
            ("contracts/payments.yaml", PAYMENTS.to_owned()),
        ].map(|(path, text)| (path.to_owned(), text)).into();
        match parse(&files) {
            Ok(directory) => {
                let first = plan(&directory, &MeshState::default(), Revision(0)).unwrap();
                let state = MeshState::default().apply_all(&first.change_set).unwrap();
                prop_assert!(plan(&directory, &state, Revision(1)).unwrap().is_empty());
            }
            Err(mistakes) => {
                prop_assert!(!mistakes.all().is_empty());
                for mistake in mistakes.all() {
                    prop_assert!(is_read(&mistake.file));
                    prop_assert!(mistake.span.start <= mistake.span.end && mistake.span.end <= mistake.text.len(), "{:?}", mistake);
                    prop_assert!(mistake.position() >= (1, 1));
                }
            }
        }
    }

    #[test]
    fn a_policy_file_of_any_text_is_parsed_or_refused(text in file_text(POLICY)) {
        let _ = policy::parse_file("policies/all.cedar", &text);
    }

    #[test]
    fn a_name_of_any_text_is_parsed_or_refused(text: String) {
        let _ = (TrustDomain::parse(&text), ServiceName::parse(&text), InstanceId::parse(&text));
        let _ = (NormalPath::parse(&text), Authority::parse(&text));
        if let Ok(id) = SpiffeId::parse(&text) {
            prop_assert_eq!(SpiffeId::parse(id.as_str()), Ok(id));
        }
    }

    #[test]
    fn a_ledger_of_any_bytes_is_followed_or_refused_and_then_nothing_changed(
        pairs in prop::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..4), first_index in 0..3u64, root: [u8; 32],
        state: Vec<u8>, frontier: Vec<Vec<u8>>, revision in 0..9u64,
    ) {
        let (entries, change_sets): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        for bytes in &entries {
            let _ = (Entry::parse(bytes), serde_json::from_slice::<ChangeSet>(bytes));
        }
        let bodies = Bodies::default();
        let size = first_index + entries.len() as u64;
        let batch = Batch { first_index, entries: &entries, change_sets: &change_sets, bodies: &bodies, size, root: Digest(root) };
        let mut follower = Follower::default();
        prop_assert!(follower.extend(&batch).is_err());
        prop_assert_eq!(follower, Follower::default());
        let last_entry = entries.into_iter().next().unwrap_or_default();
        let snapshot = Snapshot { revision: Revision(revision), state, frontier, last_entry, bodies };
        prop_assert!(Follower::from_snapshot(&snapshot).is_err());
    }
}
