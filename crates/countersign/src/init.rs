//! `init`: writes a small mesh directory that `up` runs. Overwrites nothing.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use crate::{
    cli::InitArguments,
    client::shown,
    error::{Done, Failure},
    render::{self, Output},
};

/// What is written, below the directory.
const FILES: [(&str, &str); 8] = [
    ("mesh.toml", include_str!("init/mesh.toml")),
    ("roles.toml", include_str!("init/roles.toml")),
    ("policies/greeter.cedar", include_str!("init/greeter.cedar")),
    ("tests/decisions.toml", include_str!("init/decisions.toml")),
    ("services/greeter.py", include_str!("init/greeter.py")),
    ("services/web.py", include_str!("init/web.py")),
    ("README.md", include_str!("init/README.md")),
    (".gitignore", "/.countersign\n"),
];

/// Writes all of it, or nothing when something of it is there already.
pub fn init(arguments: &InitArguments, output: Output) -> Done {
    let dir = &arguments.dir;
    let present: Vec<&str> =
        FILES.iter().map(|(file, _)| *file).filter(|file| dir.join(file).symlink_metadata().is_ok()).collect();
    if !present.is_empty() {
        let failure = Failure::new(format!("`{}` is not empty, and nothing is overwritten", dir.display()));
        let failure = present.iter().fold(failure, |failure, file| failure.cause(format!("`{file}` is there already")));
        return Err(failure.help("name a new directory: `countersign init DIR`"));
    }
    let mut written = Vec::new();
    for (file, text) in FILES {
        let path = dir.join(file);
        write(&path, &text.replace("{trust_domain}", arguments.trust_domain.as_str())).map_err(|e| {
            Failure::new(format!("could not write `{}`", path.display()))
                .because(&e)
                .help("the directory, and room in it, must be yours; remove what was written and run it again")
        })?;
        written.push(path);
    }
    render::answer(output, &serde_json::json!({ "dir": dir, "files": written }), |_, paint| {
        let up = match dir.canonicalize().map(|dir| shown(&dir)) {
            Ok(shown) if shown == "." => "countersign up .".to_owned(),
            _ => format!("countersign up {}", dir.display()),
        };
        let lines: Vec<String> =
            written.iter().map(|path: &PathBuf| format!("{} {}\n", paint.good("+"), path.display())).collect();
        format!("{}\nrun it with `{up}`; its README.md says what to try\n", lines.concat())
    })
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    // A file that appeared since the look above is not overwritten either.
    fs::File::create_new(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(dir: &Path) -> InitArguments {
        InitArguments { dir: dir.to_path_buf(), trust_domain: "tiny.example".parse().unwrap() }
    }

    #[test]
    fn a_new_directory_names_its_trust_domain_and_nothing_is_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        init(&arguments(&dir), Output::Json).unwrap();
        assert!(fs::read_to_string(dir.join("mesh.toml")).unwrap().contains("trust_domain = \"tiny.example\""));
        fs::write(dir.join("mesh.toml"), "mine").unwrap();
        let failure = init(&arguments(&dir), Output::Json).unwrap_err();
        assert!(failure.to_string().contains("nothing is overwritten"), "{failure}");
        assert_eq!(fs::read_to_string(dir.join("mesh.toml")).unwrap(), "mine");
    }
}
