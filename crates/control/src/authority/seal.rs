//! Secrets at rest: a data key for each secret, wrapped by the key-encryption key, both with AES-256-GCM-SIV. The
//! purpose is authenticated with each, so that a secret moved to another name does not open.
//!
//! The key-encryption key lives in a file of mode 0600 that only this room reads. It never stands in the store.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use zeroize::Zeroizing;

/// First byte of everything sealed: the format.
const FORMAT: u8 = 1;
const KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const WRAPPED_BYTES: usize = NONCE_LEN + KEY_BYTES + TAG_BYTES;

/// Seals and opens secrets with the key-encryption key.
pub struct Sealer {
    key: RandomizedNonceKey,
    path: PathBuf,
}

/// Why the key-encryption key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
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
    #[error("key file `{0}` does not hold 64 hexadecimal digits")]
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
}

impl KeyFileError {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Mode { path, .. } => format!("chmod 600 {}", path.display()),
            Self::Owner { path, .. } => format!("run as the owner of {}, or chown it", path.display()),
            Self::Shape(path) | Self::Missing(path) => {
                format!("restore {} from a copy; without it the mesh's keys are lost", path.display())
            }
            Self::Io { path, .. } => format!("check that {} can be read by this user", path.display()),
        }
    }
}

/// It was sealed with another key, for another purpose, or it was changed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sealed key does not open: it was changed, or sealed with another key")]
pub struct Unopened;

impl Sealer {
    /// Reads the key-encryption key. Makes one when there is none and `may_create` says that nothing is sealed yet.
    pub fn open(path: &Path, may_create: bool) -> Result<Self, KeyFileError> {
        let io = |source| KeyFileError::Io { path: path.into(), source };
        let text = match OpenOptions::new().read(true).open(path) {
            Ok(file) => read(path, file)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound && may_create => create(path).map_err(io)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(KeyFileError::Missing(path.into())),
            Err(e) => return Err(io(e)),
        };
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        hex::decode_to_slice(text.trim(), &mut *key).map_err(|_| KeyFileError::Shape(path.into()))?;
        Ok(Self { key: aead_key(&key), path: path.into() })
    }

    /// Where the key-encryption key comes from.
    pub fn place(&self) -> String {
        format!("file {}", self.path.display())
    }

    /// Seals `secret` for `purpose`: format, wrapped data key, sealed secret.
    pub fn seal(&self, purpose: &str, secret: &[u8]) -> Vec<u8> {
        let mut data_key = Zeroizing::new([0; KEY_BYTES]);
        aws_lc_rs::rand::fill(&mut *data_key).expect("INVARIANT: the system's random source does not fail");
        let mut sealed = vec![FORMAT];
        sealed.extend(encrypt(&self.key, &wrap_purpose(purpose), &*data_key));
        sealed.extend(encrypt(&aead_key(&data_key), &secret_purpose(purpose), secret));
        sealed
    }

    /// Opens what was sealed for `purpose`.
    pub fn unseal(&self, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Unopened> {
        let (&[FORMAT], rest) = sealed.split_first_chunk::<1>().ok_or(Unopened)? else { return Err(Unopened) };
        let (wrapped, secret) = rest.split_at_checked(WRAPPED_BYTES).ok_or(Unopened)?;
        let data_key = decrypt(&self.key, &wrap_purpose(purpose), wrapped)?;
        let data_key = <&[u8; KEY_BYTES]>::try_from(data_key.as_slice()).map_err(|_| Unopened)?;
        decrypt(&aead_key(data_key), &secret_purpose(purpose), secret)
    }
}

fn wrap_purpose(purpose: &str) -> String {
    format!("countersign/v1/data-key/{purpose}")
}

fn secret_purpose(purpose: &str) -> String {
    format!("countersign/v1/secret/{purpose}")
}

fn aead_key(key: &[u8; KEY_BYTES]) -> RandomizedNonceKey {
    RandomizedNonceKey::new(&AES_256_GCM_SIV, key).expect("INVARIANT: a key of AES-256 has 32 bytes")
}

/// Nonce, then ciphertext and tag.
fn encrypt(key: &RandomizedNonceKey, purpose: &str, plain: &[u8]) -> Vec<u8> {
    let mut buffer = plain.to_vec();
    let nonce = key
        .seal_in_place_append_tag(Aad::from(purpose.as_bytes()), &mut buffer)
        .expect("INVARIANT: sealing a bounded secret does not fail");
    let mut out = nonce.as_ref().to_vec();
    out.append(&mut buffer);
    out
}

fn decrypt(key: &RandomizedNonceKey, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Unopened> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(Unopened)?;
    let mut buffer = Zeroizing::new(sealed.to_vec());
    let length =
        key.open_in_place(Nonce::from(nonce), Aad::from(purpose.as_bytes()), &mut buffer).map_err(|_| Unopened)?.len();
    buffer.truncate(length);
    Ok(buffer)
}

fn read(path: &Path, mut file: File) -> Result<Zeroizing<String>, KeyFileError> {
    let io = |source| KeyFileError::Io { path: path.into(), source };
    let metadata = file.metadata().map_err(io)?;
    if metadata.mode() & 0o077 != 0 {
        return Err(KeyFileError::Mode { path: path.into(), mode: metadata.mode() & 0o7777 });
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(KeyFileError::Owner { path: path.into(), owner: metadata.uid() });
    }
    let mut text = Zeroizing::new(String::new());
    (&mut file).take(1024).read_to_string(&mut text).map_err(io)?;
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

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("key", &"..").field("path", &self.path).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_changed_moved_to_another_name_or_sealed_by_another_key_does_not_open() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::open(&dir.path().join("keys/kek"), true).unwrap();
        let other = Sealer::open(&dir.path().join("keys/other"), true).unwrap();
        let sealed = sealer.seal("root", b"secret");
        assert_eq!(sealer.unseal("issuing", &sealed), Err(Unopened));
        assert_eq!(other.unseal("root", &sealed), Err(Unopened));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(sealer.unseal("root", &changed), Err(Unopened), "byte {at}");
            assert_eq!(sealer.unseal("root", &sealed[..at]), Err(Unopened), "cut at {at}");
        }
        assert_eq!(sealer.unseal("root", &sealed).unwrap().as_slice(), b"secret");
        let again = Sealer::open(&dir.path().join("keys/kek"), false).unwrap();
        assert_eq!(again.unseal("root", &sealed).unwrap().as_slice(), b"secret");
    }

    #[test]
    fn a_key_file_that_others_can_read_that_is_none_or_that_is_gone_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek");
        assert!(matches!(Sealer::open(&path, false), Err(KeyFileError::Missing(_))));
        Sealer::open(&path, true).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        for mode in [0o640, 0o604, 0o660, 0o644] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(
                matches!(Sealer::open(&path, true), Err(KeyFileError::Mode { mode: m, .. }) if m == mode),
                "{mode:o}"
            );
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for content in ["", "abcd", &"0".repeat(63), &"0".repeat(66), &"g".repeat(64)] {
            fs::write(&path, content).unwrap();
            assert!(matches!(Sealer::open(&path, true), Err(KeyFileError::Shape(_))), "{content}");
        }
    }
}
