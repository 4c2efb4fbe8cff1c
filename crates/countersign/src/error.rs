//! How a command fails: what was tried, the chain of causes, what to do, and the exit code. Printed in one place.
//!
//! | exit code | means |
//! |---|---|
//! | 0 | done |
//! | 1 | failed |
//! | 2 | the command line is wrong |
//! | 3 | refused, or not yet let through: by the change gate or the law |

use std::{error::Error, fmt, process::ExitCode};

use countersign_api::local::{GateRefusal, Problem};

use countersign_core::directory::Mistake;

use crate::{
    mistake,
    render::{Output, Paint},
};

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    what: String,
    causes: Vec<String>,
    mistakes: Vec<Mistake>,
    help: Option<String>,
    kind: Kind,
    refusal: Option<Box<GateRefusal>>,
}

/// What the exit code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It failed.
    Failed,
    /// The command line asks for something that does not exist or contradicts itself.
    Usage,
    /// The change gate or the law said no.
    Refused,
    /// The state that was planned on is not the newest any more. `apply` plans again.
    Moved,
}

/// What every command returns.
pub type Done = Result<(), Failure>;

impl Failure {
    /// `what` names what was tried, lower case, input in backticks.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            causes: Vec::new(),
            mistakes: Vec::new(),
            help: None,
            kind: Kind::Failed,
            refusal: None,
        }
    }

    /// Something the command line got wrong.
    pub fn usage(what: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, ..Self::new(what) }
    }

    /// Something that the gate or the law does not let through.
    pub fn refused(what: impl Into<String>) -> Self {
        Self { kind: Kind::Refused, ..Self::new(what) }
    }

    /// Adds the chain of `cause`.
    pub fn because(mut self, cause: &(dyn Error + 'static)) -> Self {
        let mut next = Some(cause);
        while let Some(cause) = next {
            let text = cause.to_string();
            // Some errors repeat their source in their own text.
            if !self.causes.last().is_some_and(|last| last.ends_with(&text)) {
                self.causes.push(text);
            }
            next = cause.source();
        }
        self
    }

    /// Adds one cause that is only a text; it may have several lines.
    pub fn cause(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// Adds mistakes that stand in files, each of which is shown with its line and a caret.
    pub fn mistakes(mut self, mistakes: Vec<Mistake>) -> Self {
        self.mistakes = mistakes;
        self
    }

    /// Says what to do.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Says what else can be done.
    pub fn or_help(mut self, more: &str) -> Self {
        self.help = Some(self.help.map_or_else(|| more.to_owned(), |help| format!("{help}, {more}")));
        self
    }

    /// What the change gate asks for, when it was the gate that refused.
    pub fn refusal(&self) -> Option<&GateRefusal> {
        self.refusal.as_deref()
    }

    /// What the exit code will say.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The exit code of the process.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.kind {
            Kind::Failed | Kind::Moved => 1,
            Kind::Usage => 2,
            Kind::Refused => 3,
        })
    }

    /// The failure as a document.
    pub fn json(&self) -> serde_json::Value {
        let mistakes: Vec<_> = self.mistakes.iter().map(mistake::json).collect();
        serde_json::json!({ "error": self.what, "causes": self.causes, "mistakes": mistakes, "help": self.help })
    }

    /// The text of a failure; JSON when that was asked for, so that a program never has to parse prose.
    pub fn render(&self, output: Output, paint: Paint) -> String {
        if output == Output::Json {
            return format!("{}\n", self.json());
        }
        let mut text = format!("{} {}\n", paint.bad("error:"), self.what);
        for line in self.causes.iter().flat_map(|cause| cause.lines()) {
            text.push_str(if line.is_empty() { "" } else { "  " });
            text.push_str(line);
            text.push('\n');
        }
        for mistake in &self.mistakes {
            text.push('\n');
            text.push_str(&mistake::text(mistake, paint));
        }
        if let Some(help) = &self.help {
            text.push_str(&format!("  {} {help}\n", paint.note("help:")));
        }
        text
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        let kind = match problem.status {
            _ if problem.refusal.is_some() => Kind::Refused,
            403 | 422 => Kind::Refused,
            409 => Kind::Moved,
            _ => Kind::Failed,
        };
        Self {
            what: problem.title,
            causes: problem.detail.into_iter().collect(),
            mistakes: Vec::new(),
            help: problem.help,
            kind,
            refusal: problem.refusal,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl Error for Failure {}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_failure_says_what_why_and_what_to_do() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        let failure = Failure::new("could not read `mesh.toml`").because(&io).help("make one with `countersign init`");
        expect![[r"
            error: could not read `mesh.toml`
              no such file
              help: make one with `countersign init`
        "]]
        .assert_eq(&failure.render(Output::Text, Paint::plain()));
        let json: serde_json::Value = serde_json::from_str(&failure.render(Output::Json, Paint::plain())).unwrap();
        assert_eq!(json["causes"][0], "no such file");
    }

    #[test]
    fn a_refusal_and_a_moved_base_are_told_apart_from_a_failure() {
        for (status, kind) in
            [(422, Kind::Refused), (403, Kind::Refused), (409, Kind::Moved), (404, Kind::Failed), (500, Kind::Failed)]
        {
            let problem = Problem { title: "t".into(), status, detail: None, help: None, refusal: None };
            assert_eq!(Failure::from(problem).kind(), kind, "{status}");
        }
    }
}
