//! Writes the documents that say what the code knows, and compares them. `UPDATE_DOCS=1` rewrites them.

use std::{env, fmt::Write as _, fs, path::Path};

use countersign_core::directory::{self, Files, reference};

const MESH: &str = include_str!("mesh/mesh.toml");
const ROLES: &str = include_str!("mesh/roles.toml");
const ROUTES: &str = include_str!("mesh/routes.toml");
const PAYMENTS: &str = include_str!("mesh/payments.yaml");

/// Compares `docs/<name>` with `expected`, or writes it.
fn document(name: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, expected).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "docs/{name} is not what the code says; run `make docs` and read the difference");
}

#[test]
fn the_example_of_the_documents_uses_every_key_and_has_no_mistake() {
    let files: Files =
        [("mesh.toml", MESH), ("roles.toml", ROLES), ("routes.toml", ROUTES), ("contracts/payments.yaml", PAYMENTS)]
            .map(|(k, v)| (k.into(), v.into()))
            .into();
    if let Err(mistakes) = directory::parse(&files) {
        panic!("{:#?}", mistakes.all());
    }
    for section in reference() {
        let text = match section.file {
            "mesh.toml" => MESH,
            "roles.toml" => ROLES,
            _ => ROUTES,
        };
        for key in section.keys.iter().filter(|key| key.shape != "table" || !key.default.is_empty()) {
            let heads = [format!("\n{} = ", key.name), format!("{{ {} = ", key.name), format!(", {} = ", key.name)];
            let found = heads.iter().any(|head| format!("\n{text}").contains(head));
            assert!(found, "`{}` of {} {} is not in the example", key.name, section.file, section.table);
        }
    }
}

#[test]
fn documents_of_the_mesh_directory() {
    let mut text = format!(
        "# The mesh directory

A mesh is described by a directory under version control. `countersign plan` shows what a change of it would do,
`countersign apply` does it, and `countersign up` does it whenever a file is saved. All of it is applied, or none of it.

| file | holds |
|---|---|
| `mesh.toml` | the trust domain, defaults, the services and how to run them; the only file that must be there |
| `roles.toml` | roles and who has them |
| `routes.toml` | traffic rules: weights, timeouts, retries, limits |
| `contracts/*` | which operations services have: [contracts.md](contracts.md) |
| `policies/*.cedar` | the request gate: [policy.md](policy.md) |
| `gate/*.cedar` | the change gate, in place of the shipped one: [gate.md](gate.md) |
| `tests/*.toml` | decisions that must hold: [policy.md](policy.md) |

Unknown keys are refused. Every mistake in every file is told at once, with its line, a caret, and what was probably
meant. A service that is named anywhere has to exist. Paths in rules are written in their normal form: what is matched is
the [normalized path](#paths), the same that policies judge and that the service receives.

```toml
# mesh.toml
{MESH}```

```toml
# roles.toml
{ROLES}```

```toml
# routes.toml
{ROUTES}```
"
    );
    let mut file = "";
    for section in reference() {
        if section.file != file {
            file = section.file;
            let _ = write!(text, "\n## `{file}`\n");
        }
        if !section.table.is_empty() {
            let _ = write!(text, "\n### `{}`\n", section.table);
        }
        if !section.says.is_empty() {
            let _ = write!(text, "\n{}\n", section.says);
        }
        let cell = |text: &str| text.replace('|', "\\|");
        text += "\n| key | value | when absent | |\n|---|---|---|---|\n";
        for key in section.keys {
            let [shape, default, says] = [key.shape, key.default, key.says].map(cell);
            let _ = writeln!(text, "| `{}` | {shape} | {default} | {says} |", key.name);
        }
    }
    text += "
## Paths

Two programs that read the same bytes as different paths are how a policy is walked around. So each path is brought to
one form, once, and what software in the field reads in more than one way is refused with 400:

| in the path of a request | becomes |
|---|---|
";
    for (given, becomes) in [
        ("an encoded letter, digit, `-`, `.`, `_` or `~`: `%41`", "itself: `A`"),
        ("another encoding in lower case: `%c3%a9`", "upper case: `%C3%A9`"),
        ("`\"` `<` `>` `[` `]` `^` `` ` `` `{` `\\|` `}`", "encoded"),
        ("`.` or `..` as a segment, raw or encoded, also before `%3B`", "400"),
        ("an empty segment, `//` (a slash at the end stays)", "400"),
        ("a raw `;` (`%3B` stays)", "400"),
        ("an encoded slash or backslash, a raw backslash", "400"),
        ("an encoding inside an encoding, `%252e`", "400"),
        (
            "control characters, raw or encoded; a raw space, `#` or non-ASCII byte; encoded bytes that are no UTF-8",
            "400",
        ),
    ] {
        let _ = writeln!(text, "| {given} | {becomes} |");
    }
    text += "\nThe query is not judged and is forwarded as it came.\n";
    document("mesh-directory.md", &text);
}
