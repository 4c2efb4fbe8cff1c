//! What a login leaves on this machine: the token of the session and the key that it is bound to, in one file for each dashboard that
//! only its owner can read, from its first moment on.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use countersign_api::dpop::ProofKey;

use super::Dashboard;
use crate::error::Failure;

/// Where logins are kept, in place of the user's state directory.
const DIR_VARIABLE: &str = "COUNTERSIGN_LOGIN_DIR";

/// A login.
pub struct Login {
    /// Of which dashboard.
    pub dashboard: Dashboard,
    /// Who is signed in.
    pub who: String,
    /// What the session is found by.
    pub token: String,
    /// What it is bound to.
    pub key: ProofKey,
    /// A PEM file of certificates that the dashboard is verified with, beside those that the system trusts.
    pub ca_file: Option<PathBuf>,
}

/// As it lies in its file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    dashboard: String,
    #[serde(alias = "operator")]
    who: String,
    token: String,
    key: String, // PKCS #8, base64url
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca_file: Option<PathBuf>,
}

/// The directory of all logins.
pub struct Logins(PathBuf);

impl Logins {
    /// This user's.
    pub fn here() -> Result<Self, Failure> {
        let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
        let named = absolute(DIR_VARIABLE);
        let state = || absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
        let dir = named.or_else(|| state().map(|state| state.join("countersign/logins")));
        dir.map(Self).ok_or_else(|| {
            Failure::new("there is no place to keep a login")
                .help(format!("set HOME, XDG_STATE_HOME or {DIR_VARIABLE}"))
        })
    }

    fn file(&self, dashboard: &Dashboard) -> PathBuf {
        self.0.join(format!("{}.json", dashboard.0.replace("://", "_").replace(':', "_")))
    }

    /// The login of a dashboard, if there is one.
    pub fn find(&self, dashboard: &Dashboard) -> Result<Option<Login>, Failure> {
        let path = self.file(dashboard);
        let unread = || Failure::new(format!("could not read the login `{}`", path.display()));
        let bytes = match read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unread().because(&error).help("remove it, and sign in again")),
        };
        let again = || unread().help("remove it, and sign in again with `countersign login`");
        let file: File = serde_json::from_slice(&bytes).map_err(|error| again().because(&error))?;
        let key = URL_SAFE_NO_PAD.decode(&file.key).map_err(|error| again().because(&error))?;
        let key = ProofKey::from_pkcs8(&key).map_err(|error| again().because(&error))?;
        if file.dashboard != dashboard.0 {
            return Err(again().cause(format!("it is of `{}`", file.dashboard)));
        }
        let File { who, token, ca_file, .. } = file;
        Ok(Some(Login { dashboard: dashboard.clone(), who, token, key, ca_file }))
    }

    /// The dashboards of all logins.
    pub fn all(&self) -> Vec<Dashboard> {
        let files = fs::read_dir(&self.0).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
        let json = files.filter(|path| path.extension().is_some_and(|end| end == "json"));
        let read = json.filter_map(|path| serde_json::from_slice::<File>(&read(&path).ok()?).ok());
        read.map(|file| Dashboard(file.dashboard)).collect()
    }

    /// Keeps a login, in place of an earlier one of the same dashboard: the old or the new one, whatever happens.
    pub fn keep(&self, login: &Login) -> Result<PathBuf, Failure> {
        let path = self.file(&login.dashboard);
        let file = File {
            dashboard: login.dashboard.0.clone(),
            who: login.who.clone(),
            token: login.token.clone(),
            key: URL_SAFE_NO_PAD.encode(login.key.to_pkcs8()),
            ca_file: login.ca_file.clone(),
        };
        let written = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
            let draft = path.with_extension(format!("new-{}", std::process::id()));
            let _ = fs::remove_file(&draft);
            let mut new = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
            new.write_all(&serde_json::to_vec(&file)?)?;
            new.sync_all()?;
            fs::rename(&draft, &path)
        };
        written().map(|()| path.clone()).map_err(|error: io::Error| {
            Failure::new(format!("could not keep the login in `{}`", path.display()))
                .because(&error)
                .help(format!("make the directory writable, or name another in {DIR_VARIABLE}"))
        })
    }

    /// Forgets the login of a dashboard.
    pub fn forget(&self, dashboard: &Dashboard) -> Result<(), Failure> {
        let path = self.file(dashboard);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Failure::new(format!("could not remove the login `{}`", path.display())).because(&error))
            }
            _ => Ok(()),
        }
    }
}

/// A file that others could read, or wrote, is not used.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = fs::File::open(path)?;
    let about = file.metadata()?;
    if about.mode() & 0o077 != 0 || about.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others can read it, or it is somebody else's"));
    }
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut file, &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_login_is_for_its_owner_alone_and_one_that_others_can_read_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        let logins = Logins(root.path().join("state/logins"));
        let dashboard = Dashboard::parse("https://mesh.example:8443/").unwrap();
        assert!(logins.find(&dashboard).unwrap().is_none());
        let login = |token: &str| Login {
            dashboard: dashboard.clone(),
            who: "alice".into(),
            token: token.into(),
            key: ProofKey::generate(),
            ca_file: None,
        };
        logins.keep(&login("one")).unwrap();
        let (kept, path) = (login("two"), logins.keep(&login("one")).unwrap());
        assert_eq!(logins.keep(&kept).unwrap(), path);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&logins.0)), (0o600, 0o700));
        assert_eq!(fs::read_dir(&logins.0).unwrap().count(), 1, "no draft stays");
        let found = logins.find(&dashboard).unwrap().unwrap();
        assert_eq!((&*found.token, found.key.thumbprint()), ("two", kept.key.thumbprint()));
        assert_eq!(logins.all(), std::slice::from_ref(&dashboard));

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(logins.find(&dashboard).is_err());
        assert!(logins.all().is_empty());
        logins.forget(&dashboard).unwrap();
        logins.forget(&dashboard).unwrap();
        assert!(logins.find(&dashboard).unwrap().is_none());
    }
}
