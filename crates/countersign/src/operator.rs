//! `operator` and `factor`: who may change the mesh, and how they show that it is they. Changes of them pass the change gate like
//! any other.

use std::io::{self, BufRead};

use clap::{Args, Subcommand};
use serde_json::json;

use countersign_api::local::{
    Applied, Apply, ApplyAs, Code, Confirm, Enrol, Enrolled, Enrolment, EnrolmentLink, Mesh, Opened,
    OperatorInvitation, Shown,
};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, RoleName},
    gate::act::Act,
    identity::{FactorId, OperatorName},
};

use crate::{
    client::Client,
    error::{Done, Failure, Kind},
    mesh_finder::Place,
    qr,
    render::{self, Output, Paint, cell, verdict},
    sign, status,
};

/// How often a change is asked for again because someone else's came first.
const ATTEMPTS_MAX: usize = 5;
/// Codes that are read until an enrolment is given up.
const CODES_MAX: usize = 5;

/// Who asks for a change, and what they show for it.
#[derive(Debug, Clone, Default, Args)]
pub struct Who {
    /// The operator who asks [default: the only one that has enrolled]
    #[arg(long, value_name = "NAME", env = "COUNTERSIGN_OPERATOR", hide_env_values = true)]
    pub operator: Option<OperatorName>,
    /// The code that the operator's authenticator app shows now
    #[arg(long, value_name = "CODE")]
    pub otp: Option<String>,
    /// Sign it with a passkey or a security key, over what this command verified itself [default: in a sealed mesh]
    #[arg(long, conflicts_with = "otp")]
    pub sign: bool,
    /// The anchor of the mesh, as other operators say it [default: the one pinned when it was first seen]
    #[arg(long, value_name = "DIGEST", hide_short_help = true)]
    pub anchor: Option<Digest>,
}

impl Who {
    /// As it travels.
    pub fn shown(&self) -> Shown {
        Shown {
            operator: self.operator.clone(),
            otp: self.otp.clone().map(Code),
            recovery_code: None,
            countersignature: None,
        }
    }
}

/// Who asks for what changes nothing, and what they show for it.
#[derive(Debug, Clone, Default, Args)]
pub struct Asker {
    /// The operator who asks, in a protected mesh [default: the only one that has enrolled]
    #[arg(long, value_name = "NAME", env = "COUNTERSIGN_OPERATOR", hide_env_values = true)]
    pub operator: Option<OperatorName>,
    /// The code that the operator's authenticator app shows now, where the gate asks for one
    #[arg(long, value_name = "CODE")]
    pub otp: Option<String>,
}

impl Asker {
    /// As it travels.
    pub fn shown(&self) -> Shown {
        Shown { operator: self.operator.clone(), otp: self.otp.clone().map(Code), ..Shown::default() }
    }

    /// Opens `act`; the client that comes back reads as the operator for whom it was opened.
    pub async fn opens(&self, control: Client, act: Act) -> Result<Client, Failure> {
        let opened: Opened = control.post(&format!("/v1/acts/{}", act.as_str()), &self.shown()).await?;
        Ok(control.reading_as(opened.operator))
    }
}

/// What can be done with operators.
#[derive(Debug, Subcommand)]
pub enum OperatorVerb {
    /// List them
    List,
    /// Enrol an authenticator app: the first operator becomes owner, and from then on the mesh is protected
    ///
    /// Prints what the app is to be told, reads its code from standard input, and prints recovery codes, once.
    Enroll {
        /// Who [default: the name of this user for the first, or else what the invitation needs]
        #[arg(long, value_name = "NAME")]
        operator: Option<OperatorName>,
        /// An authenticator app with codes that follow the clock
        #[arg(long, required = true)]
        totp: bool,
        /// What an invited operator was handed
        #[arg(long, value_name = "TOKEN")]
        invitation: Option<String>,
    },
    /// Print a link by which the first operator enrols a passkey or a security key in a browser
    ///
    /// It is good once, for 15 minutes, while the mesh is unprotected.
    Link,
    /// Invite one, and print what they are to be handed
    Invite {
        /// Their name
        name: OperatorName,
        /// What the gate will know them as: `owner`, `editor`, `deployer`, or what gate/ names
        #[arg(long, value_name = "ROLES", value_delimiter = ',', default_value = "editor")]
        roles: Vec<String>,
        /// Who asks.
        #[command(flatten)]
        who: Who,
    },
    /// Take one out, with all their factors
    Remove {
        /// Their name
        name: OperatorName,
        /// Who asks.
        #[command(flatten)]
        who: Who,
    },
    /// Replace one's roles
    Roles {
        /// Their name
        name: OperatorName,
        /// What the gate will know them as
        #[arg(value_name = "ROLES", value_delimiter = ',', required = true)]
        roles: Vec<String>,
        /// Who asks.
        #[command(flatten)]
        who: Who,
    },
}

/// What can be done with factors.
#[derive(Debug, Subcommand)]
pub enum FactorVerb {
    /// List them
    List {
        /// Whose [default: everybody's]
        #[arg(long, value_name = "NAME")]
        operator: Option<OperatorName>,
    },
    /// Add one to an operator who has one, or has a recovery code
    Add {
        /// An authenticator app with codes that follow the clock
        #[arg(long, required = true)]
        totp: bool,
        /// A recovery code, when the other factors are lost
        #[arg(long, value_name = "CODE", conflicts_with = "otp")]
        recovery_code: Option<String>,
        /// Who asks.
        #[command(flatten)]
        who: Who,
    },
    /// Take one away
    Remove {
        /// Its id, or the beginning of it
        factor: FactorId,
        /// Who asks.
        #[command(flatten)]
        who: Who,
    },
}

/// Does what `operator …` says.
pub async fn operator(verb: OperatorVerb, place: &Place, output: Output) -> Done {
    let control = Client::control(place);
    match verb {
        OperatorVerb::List => list(&control, output).await,
        OperatorVerb::Enroll { operator, totp: _, invitation } => {
            let operator = match operator {
                Some(name) => name,
                None => own_name(invitation.is_some())?,
            };
            enrol(&control, Enrol { operator, invitation: invitation.map(Code), shown: Shown::default() }, output).await
        }
        OperatorVerb::Link => {
            let link: EnrolmentLink = control.post("/v1/enrolments/link", &json!({})).await?;
            let told =
                |link: &EnrolmentLink, _| format!("open it within 15 minutes; it is good once\n\n{}\n\n", link.url);
            render::answer(output, &link, told)
        }
        OperatorVerb::Invite { name, roles, who } => {
            change(&control, &who, output, |_| Ok(Change::InviteOperator { name: name.clone(), roles: names(&roles) }))
                .await
        }
        OperatorVerb::Remove { name, who } => {
            change(&control, &who, output, |_| Ok(Change::RemoveOperator { name: name.clone() })).await
        }
        OperatorVerb::Roles { name, roles, who } => {
            let set = |_: &Mesh| Ok(Change::SetOperatorRoles { name: name.clone(), roles: names(&roles) });
            change(&control, &who, output, set).await
        }
    }
}

/// Does what `factor …` says.
pub async fn factor(verb: FactorVerb, place: &Place, output: Output) -> Done {
    let control = Client::control(place);
    match verb {
        FactorVerb::List { operator } => factors(&control, operator, output).await,
        FactorVerb::Add { totp: _, recovery_code, who } => {
            let mesh: Mesh = control.get("/v1/mesh").await?;
            let operator = who.operator.clone().or_else(|| only_one(&mesh)).ok_or_else(|| {
                Failure::usage("no operator is named, and not exactly one has enrolled")
                    .help("name one: `--operator NAME`")
            })?;
            let shown = Shown { recovery_code: recovery_code.map(Code), ..who.shown() };
            enrol(&control, Enrol { operator, invitation: None, shown }, output).await
        }
        FactorVerb::Remove { factor, who } => {
            change(&control, &who, output, |mesh| {
                let all = mesh.state.operators.iter().flat_map(|(name, o)| o.factors.keys().map(move |id| (name, id)));
                let found: Vec<_> = all.filter(|(_, id)| id.as_str().starts_with(factor.as_str())).collect();
                match found[..] {
                    [(operator, id)] => Ok(Change::RemoveFactor { operator: operator.clone(), id: id.clone() }),
                    [] => Err(Failure::new(format!("there is no factor `{factor}`"))
                        .help("`countersign factor list` shows those that are there")),
                    _ => {
                        Err(Failure::new(format!("several factors begin with `{factor}`")).help("give more of its id"))
                    }
                }
            })
            .await
        }
    }
}

/// Asks for one change, planned on the mesh as it is.
pub async fn change(
    control: &Client,
    who: &Who,
    output: Output,
    planned: impl Fn(&Mesh) -> Result<Change, Failure>,
) -> Done {
    changes(control, who, output, |mesh| planned(mesh).map(|change| vec![change])).await
}

/// The same with several, in one change-set.
pub async fn changes(
    control: &Client,
    who: &Who,
    output: Output,
    planned: impl Fn(&Mesh) -> Result<Vec<Change>, Failure>,
) -> Done {
    let mut attempts = 0;
    let is_signed = sign::is_wanted(control, who, output).await?;
    let applied: Applied = loop {
        if is_signed {
            let ground = sign::verified(control, who).await?;
            let change_set = ChangeSet { base: ground.mesh.revision, changes: planned(&ground.mesh)? };
            break sign::ask(control, &ground, who, Apply { change_set, bodies: Bodies::default() }).await?;
        }
        let mesh: Mesh = control.get("/v1/mesh").await?;
        let change_set = ChangeSet { base: mesh.revision, changes: planned(&mesh)? };
        let asked = ApplyAs { apply: Apply { change_set, bodies: Bodies::default() }, shown: who.shown() };
        match control.post("/v1/changes", &asked).await {
            Ok(applied) => break applied,
            Err(failure) if failure.kind() == Kind::Moved && attempts < ATTEMPTS_MAX => attempts += 1,
            Err(failure) => return Err(failure),
        }
    };
    render::answer(output, &applied, |applied, paint| {
        let mut text = format!("{} revision {}\n", paint.good("applied:"), applied.revision);
        for invitation in &applied.invitations {
            text.push_str(&handed(invitation, paint));
        }
        if !applied.protected {
            text.push_str(&format!("{} {}\n", paint.warn("warning:"), status::UNPROTECTED));
        }
        text
    })
}

/// What an invited operator is handed, for whoever invited them.
pub fn handed(invitation: &OperatorInvitation, paint: Paint) -> String {
    let command = format!(
        "countersign operator enroll --totp --operator {} --invitation {}",
        invitation.operator, invitation.token
    );
    let (way, how) = match &invitation.url {
        Some(url) => ("they open this, or run the command on this machine:", format!("{url}\n\n{command}")),
        None => ("on this machine they run this:", command),
    };
    format!(
        "{} it is good for {} once, until {}, and is not shown again\n\n{how}\n\n",
        paint.note(way),
        invitation.operator,
        render::moment_full(invitation.expires_at_ms),
    )
}

async fn list(control: &Client, output: Output) -> Done {
    let mesh: Mesh = control.get("/v1/mesh").await?;
    let operators: Vec<_> = mesh
        .state
        .operators
        .iter()
        .map(|(name, operator)| {
            json!({
                "operator": name,
                "roles": operator.roles,
                "factors": operator.factors.values().map(|factor| factor.kind().as_str()).collect::<Vec<_>>(),
            })
        })
        .collect();
    render::answer(output, &operators, |_, paint| {
        if mesh.state.operators.is_empty() {
            return format!("{} {}\n", paint.warn("warning:"), status::UNPROTECTED);
        }
        let rows = mesh.state.operators.iter().map(|(name, operator)| {
            let kinds: Vec<&str> = operator.factors.values().map(|factor| factor.kind().as_str()).collect();
            let state = if kinds.is_empty() { "invited" } else { "enrolled" };
            let roles: Vec<&str> = operator.roles.iter().map(|role| &**role).collect();
            vec![cell(name), verdict(state, !kinds.is_empty()), cell(status::join(&roles)), cell(status::join(&kinds))]
        });
        render::table(&["OPERATOR", "STATE", "ROLES", "FACTORS"], rows, paint)
    })
}

async fn factors(control: &Client, operator: Option<OperatorName>, output: Output) -> Done {
    let mesh: Mesh = control.get("/v1/mesh").await?;
    let meant = mesh.state.operators.iter().filter(|(name, _)| operator.as_ref().is_none_or(|meant| meant == *name));
    let factors: Vec<_> = meant
        .flat_map(|(name, operator)| {
            operator.factors.iter().map(move |(id, factor)| {
                let signs = factor.signing_key();
                let model = signs.and_then(|key| key.model);
                json!({ "operator": name, "factor": id, "kind": factor.kind().as_str(), "signs": signs.is_some(), "model": model })
            })
        })
        .collect();
    render::answer(output, &factors, |factors, paint| {
        let text = |factor: &serde_json::Value, key: &str| cell(factor[key].as_str().unwrap_or_default());
        let rows = factors.iter().map(|factor| {
            let signs = factor["signs"] == true;
            vec![
                text(factor, "operator"),
                text(factor, "kind"),
                verdict(if signs { "yes" } else { "no" }, signs),
                text(factor, "factor"),
                text(factor, "model"),
            ]
        });
        render::table(&["OPERATOR", "KIND", "SIGNS", "FACTOR", "MODEL"], rows, paint)
    })
}

/// The ceremony of an authenticator app: its secret, its first code, the recovery codes.
async fn enrol(control: &Client, asked: Enrol, output: Output) -> Done {
    let begun: Enrolment = control.post("/v1/enrolments", &asked).await?;
    match output {
        Output::Json => {
            render::print(&render::json_line(&json!({ "operator": begun.operator, "otpauth": begun.otpauth })))
        }
        Output::Text => render::print(&format!(
            "add this to the authenticator app of {}; it is a secret and is not shown again\n\n{}\n{}\n\nthe code that the app shows now: ",
            begun.operator,
            qr::for_terminal(&begun.otpauth),
            begun.otpauth
        )),
    }
    let path = format!("/v1/enrolments/{}", begun.id);
    let mut last = Failure::new("no code came on standard input").help("run it again, and type the code of the app");
    for line in io::stdin().lock().lines().take(CODES_MAX) {
        let line = line.map_err(|e| Failure::new("could not read the code").because(&e))?;
        match control.post::<Enrolled>(&path, &Confirm { code: Code(line.trim().to_owned()) }).await {
            Ok(enrolled) => return render::answer(output, &enrolled, told),
            Err(failure) if failure.kind() == Kind::Refused && failure.refusal().is_none() => {
                if output == Output::Text {
                    render::print(&format!("{failure}; again: "));
                }
                last = failure;
            }
            Err(failure) => return Err(failure),
        }
    }
    Err(last)
}

fn told(enrolled: &Enrolled, paint: Paint) -> String {
    let mut text = match enrolled.revision {
        Some(revision) => format!("{} {}, revision {revision}\n", paint.good("enrolled:"), enrolled.operator),
        None => String::new(),
    };
    if enrolled.anchor {
        text.push_str("the mesh is protected from now on: every change passes the gate, and there is no way back\n");
    }
    if !enrolled.recovery_codes.is_empty() {
        text.push_str(&format!(
            "\n{} each is good once, for a new factor when this one is lost; they are not shown again\n{}\n",
            paint.note("keep these recovery codes where the phone is not:"),
            enrolled.recovery_codes.join("\n"),
        ));
    }
    text
}

fn names(roles: &[String]) -> std::collections::BTreeSet<RoleName> {
    roles.iter().map(|role| role.as_str().into()).collect()
}

fn only_one(mesh: &Mesh) -> Option<OperatorName> {
    let mut enrolled = mesh.state.operators.iter().filter(|(_, operator)| !operator.factors.is_empty());
    match (enrolled.next(), enrolled.next()) {
        (Some((only, _)), None) => Some(only.clone()),
        _ => None,
    }
}

/// The first operator is called what this user is called.
fn own_name(is_invited: bool) -> Result<OperatorName, Failure> {
    let unnamed = || Failure::usage("the operator is not named").help("name who enrols: `--operator NAME`");
    if is_invited {
        return Err(unnamed());
    }
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "owner".to_owned());
    OperatorName::parse(&user.to_lowercase()).map_err(|_| unnamed())
}
