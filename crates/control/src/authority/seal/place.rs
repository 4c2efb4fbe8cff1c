//! Key-encryption keys that are read: from a file of mode 0600, or from a credential that systemd decrypted for this service.

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

use super::{KEY_BYTES, TokenError};

/// Where systemd says that it put them (systemd.exec(5), CREDENTIALS).
const CREDENTIALS_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";
/// What is read of a key file, in bytes.
const FILE_BYTES_MAX: u64 = 1024;

/// Why the key-encryption key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SealingKeyError {
    /// Others can read or write it.
    #[error("key file `{path}` has mode {mode:04o}: others could read the mesh's keys")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to another user.
    #[error("key file `{path}` belongs to uid {owner}, not to this user")]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// It does not hold a key.
    #[error("`{0}` does not hold 64 hexadecimal digits")]
    Shape(PathBuf),
    /// Sealed keys exist, but what opens them does not.
    #[error("key file `{0}` is missing, and the store holds keys that only it can open")]
    Missing(PathBuf),
    /// It cannot be read or made.
    #[error("could not use key file `{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody passed credentials to this process.
    #[error("credential `{0}` is not there: this process was given no $CREDENTIALS_DIRECTORY")]
    NoCredentials(String),
    /// Others were passed, or its name is none.
    #[error("credential `{name}` is not in `{dir}`")]
    NoSuchCredential {
        /// Its name.
        name: String,
        /// Where it would be.
        dir: PathBuf,
    },
    /// The security module does not offer the key.
    #[error("could not use the key `{uri}`")]
    Token {
        /// Which was asked for. It holds no secret.
        uri: String,
        /// Why.
        #[source]
        error: TokenError,
    },
}

impl SealingKeyError {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Mode { path, .. } => format!("chmod 600 {}", path.display()),
            Self::Owner { path, .. } => format!("run as the owner of {}, or chown it", path.display()),
            Self::Shape(path) | Self::Missing(path) => {
                format!("restore {} from a copy; without it the mesh's keys are lost", path.display())
            }
            Self::Io { path, .. } => format!("check that {} can be read by this user", path.display()),
            Self::NoCredentials(name) => format!(
                "start it as a systemd service with `LoadCredentialEncrypted={name}:FILE`; \
                 `openssl rand -hex 32 | systemd-creds encrypt --name={name} - FILE` makes one"
            ),
            Self::NoSuchCredential { name, .. } => {
                format!(
                    "its unit needs `LoadCredentialEncrypted={name}:FILE`; `systemd-creds list` shows what is there"
                )
            }
            Self::Token { error, .. } => error.help(),
        }
    }
}

/// The key in a file of mode 0600. Made when there is none and nothing is sealed yet.
pub(super) fn of_file(path: &Path, may_create: bool) -> Result<Zeroizing<[u8; KEY_BYTES]>, SealingKeyError> {
    let io = |source| SealingKeyError::Io { path: path.into(), source };
    let text = match OpenOptions::new().read(true).open(path) {
        Ok(file) => read(path, file)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound && may_create => create(path).map_err(io)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(SealingKeyError::Missing(path.into())),
        Err(e) => return Err(io(e)),
    };
    parse(path, &text)
}

/// The key in a credential. Its mode is systemd's business: the directory is a file system of this service's own, and is never
/// swapped out.
pub(super) fn of_credential(name: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, SealingKeyError> {
    let path = credential(name)?;
    let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX as usize));
    let read = File::open(&path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text));
    match read {
        Ok(_) => parse(&path, &text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(missing(name, &path)),
        Err(source) => Err(SealingKeyError::Io { path, source }),
    }
}

/// Where the credential `name` lies.
pub(super) fn credential(name: &str) -> Result<PathBuf, SealingKeyError> {
    let dir = env::var_os(CREDENTIALS_DIRECTORY).filter(|dir| !dir.is_empty());
    let path = PathBuf::from(dir.ok_or_else(|| SealingKeyError::NoCredentials(name.to_owned()))?).join(name);
    // A name, not a way to another file.
    if name.is_empty() || name.contains('/') || name.starts_with('.') { Err(missing(name, &path)) } else { Ok(path) }
}

fn missing(name: &str, path: &Path) -> SealingKeyError {
    SealingKeyError::NoSuchCredential { name: name.to_owned(), dir: path.parent().unwrap_or(path).to_path_buf() }
}

fn parse(path: &Path, text: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, SealingKeyError> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    hex::decode_to_slice(text.trim(), &mut *key).map_err(|_| SealingKeyError::Shape(path.into()))?;
    Ok(key)
}

fn read(path: &Path, file: File) -> Result<Zeroizing<String>, SealingKeyError> {
    let io = |source| SealingKeyError::Io { path: path.into(), source };
    let metadata = file.metadata().map_err(io)?;
    if metadata.mode() & 0o077 != 0 {
        return Err(SealingKeyError::Mode { path: path.into(), mode: metadata.mode() & 0o7777 });
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(SealingKeyError::Owner { path: path.into(), owner: metadata.uid() });
    }
    // With room for all of it: growing would leave a copy of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX as usize));
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(io)?;
    Ok(text)
}

/// A crash before the rename leaves a file beside it that the next start overwrites: a half-written key is never used.
fn create(path: &Path) -> io::Result<Zeroizing<String>> {
    let dir = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    aws_lc_rs::rand::fill(&mut *key).expect("INVARIANT: the system's random source does not fail");
    let text = Zeroizing::new(hex::encode(*key));
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::{super::Sealer, *};

    #[test]
    fn a_key_file_that_others_can_read_that_is_none_or_that_is_gone_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek");
        assert!(matches!(Sealer::open(&path, false), Err(SealingKeyError::Missing(_))));
        Sealer::open(&path, true).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        for mode in [0o640, 0o604, 0o660, 0o644] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(
                matches!(Sealer::open(&path, true), Err(SealingKeyError::Mode { mode: m, .. }) if m == mode),
                "{mode:o}"
            );
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for content in ["", "abcd", &"0".repeat(63), &"0".repeat(66), &"g".repeat(64)] {
            fs::write(&path, content).unwrap();
            assert!(matches!(Sealer::open(&path, true), Err(SealingKeyError::Shape(_))), "{content}");
        }
    }
}
