//! A key-encryption key in a security module: AES in a token, spoken to over PKCS#11. Data keys go in and come out wrapped with
//! AES-GCM; the key itself never leaves. One that could is refused.

use std::{fs, io, path::PathBuf};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::{Error, RvError},
    mechanism::{Mechanism, MechanismType, aead::GcmParams},
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    session::{Session, UserType},
    slot::Slot,
    types::AuthPin,
};
use parking_lot::Mutex;
use zeroize::Zeroizing;

use aws_lc_rs::{aead::NONCE_LEN, digest};
use countersign_core::canonical::Digest;

use super::{
    KEY_BYTES, SealingKeyError, TAG_BYTES, Unopened, digest_of, place,
    token_uri::{PinSource, TokenUri, TokenUriError},
};

/// What is encrypted to tell one key from another, and under which nonce; every other nonce is random.
const NAMED: (&[u8; NONCE_LEN], &[u8]) = (b"countersign/", b"countersign/v1/key-encryption-key/");
/// Longest PIN that is read, in bytes.
const PIN_BYTES_MAX: usize = 1024;

/// A key in a token.
pub(super) struct Token {
    uri: TokenUri,
    /// One operation at a time: a session holds the state of one.
    opened: Mutex<Opened>,
}

struct Opened {
    session: Session,
    key: ObjectHandle,
}

/// Why the security module does not offer the key.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It is not named.
    #[error("it is no PKCS#11 URI of a key")]
    Uri(#[source] TokenUriError),
    /// The module cannot be loaded.
    #[error("the module `{path}` cannot be loaded: {why}")]
    Module {
        /// The library.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// No token has this label, or several have.
    #[error("{} tokens of the module match `{wanted}`; it has {}", if *.many { "several" } else { "no" }, listed(found))]
    NoToken {
        /// The label that was asked for.
        wanted: String,
        /// The labels that there are.
        found: Vec<String>,
        /// Whether there are several.
        many: bool,
    },
    /// The PIN cannot be read.
    #[error("the PIN cannot be read from `{place}`: {why}")]
    Pin {
        /// Where it should lie.
        place: String,
        /// Why.
        why: String,
    },
    /// The token asks for one.
    #[error("the token asks for a PIN, and the URI says nowhere where it lies")]
    NoPin,
    /// It is not that of the token.
    #[error("the token does not take the PIN")]
    WrongPin,
    /// Too many were wrong.
    #[error("the token is locked: too many PINs were wrong")]
    PinLocked,
    /// No key has this label or id, or several have.
    #[error("the token has {} that `{wanted}` names", if *.many { "several secret keys" } else { "no secret key" })]
    NoKey {
        /// How it was named.
        wanted: String,
        /// Whether there are several.
        many: bool,
    },
    /// It is not one that stays inside and wraps.
    #[error("the key cannot be used: {0}")]
    Unfit(&'static str),
    /// The module said something else.
    #[error("the security module failed: {0}")]
    Failed(String),
}

impl TokenError {
    /// What to do about it.
    pub fn help(&self) -> String {
        let make = "`pkcs11-tool --module M --login --keygen --key-type AES:32 --sensitive --label LABEL` makes one";
        match self {
            Self::Uri(_) => "write it as 'pkcs11:token=LABEL;object=LABEL?module-path=/PATH.so&pin-source=file:/PATH'".into(),
            Self::Module { path, .. } => {
                format!("is {} the PKCS#11 library of the security module, of this architecture, and readable?", path.display())
            }
            Self::NoToken { .. } => {
                "`pkcs11-tool --module M --list-token-slots` shows what is there; `serial=` tells tokens of one label apart".into()
            }
            Self::Pin { .. } | Self::NoPin => {
                "keep the PIN in a file of mode 0600 or in a credential: `pin-source=file:/PATH` or `pin-source=credential:NAME`".into()
            }
            Self::WrongPin => "correct the PIN where `pin-source` says; tokens lock themselves after a few wrong ones".into(),
            Self::PinLocked => "the token's security officer sets a new PIN".into(),
            Self::NoKey { many: true, .. } => "name one of them by `id=` as well".into(),
            Self::NoKey { .. } | Self::Unfit(_) => make.into(),
            Self::Failed(_) => "is the token there, and its service running? the module's own log says more".into(),
        }
    }
}

fn listed(found: &[String]) -> String {
    if found.is_empty() { "none".to_owned() } else { found.join(", ") }
}

impl Token {
    pub(super) fn open(uri: TokenUri) -> Result<Self, TokenError> {
        let opened = Mutex::new(Opened::open(&uri)?);
        Ok(Self { uri, opened })
    }

    /// What tells the key from others: a hash of what it makes of a fixed text, which only it can make.
    pub(super) fn fingerprint(&self) -> Result<Digest, TokenError> {
        let (nonce, text) = NAMED;
        let made = self.try_with(|opened| opened.encrypt(*nonce, text, text)).map_err(failed)?;
        let mut named = digest::Context::new(&digest::SHA256);
        named.update(text);
        named.update(&made);
        Ok(digest_of(named.finish()))
    }

    /// Nonce, then ciphertext and tag.
    pub(super) fn wrap(&self, purpose: &str, data_key: &[u8; KEY_BYTES]) -> Result<Vec<u8>, String> {
        let mut nonce = [0; NONCE_LEN];
        aws_lc_rs::rand::fill(&mut nonce).expect("INVARIANT: the system's random source does not fail");
        let sealed = self.try_with(|opened| opened.encrypt(nonce, purpose.as_bytes(), data_key));
        let sealed = sealed.map_err(|error| error.to_string())?;
        if sealed.len() != KEY_BYTES + TAG_BYTES {
            return Err(format!("it wrapped a data key in {} bytes", sealed.len()));
        }
        Ok([&nonce[..], &sealed].concat())
    }

    pub(super) fn unwrap(&self, purpose: &str, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Unopened> {
        let (nonce, sealed) = wrapped.split_first_chunk::<NONCE_LEN>().ok_or(Unopened::Changed)?;
        let opened = self.try_with(|opened| opened.decrypt(*nonce, purpose.as_bytes(), sealed));
        opened.map_err(|error| match error {
            // What modules say of a tag that does not verify; the session was opened anew before it was said again.
            Error::Pkcs11(
                RvError::EncryptedDataInvalid
                | RvError::EncryptedDataLenRange
                | RvError::GeneralError
                | RvError::FunctionFailed,
                _,
            ) => Unopened::Changed,
            other => Unopened::Unavailable(other.to_string()),
        })
    }

    /// Once more with a new session when it fails: tokens are taken out and put in again.
    fn try_with<T>(&self, work: impl Fn(&Opened) -> Result<T, Error>) -> Result<T, Error> {
        let mut opened = self.opened.lock();
        let first = match work(&opened) {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        match Opened::open(&self.uri) {
            Ok(again) => *opened = again,
            Err(why) => {
                tracing::warn!(%why, "the security module could not be opened again");
                return Err(first);
            }
        }
        work(&opened)
    }
}

impl Opened {
    fn open(uri: &TokenUri) -> Result<Self, TokenError> {
        let unloaded = |why: String| TokenError::Module { path: uri.module_path.clone(), why };
        let context = Pkcs11::new(&uri.module_path).map_err(|error| unloaded(error.to_string()))?;
        match context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {}
            Err(error) => return Err(unloaded(error.to_string())),
        }
        let slot = slot_of(&context, uri)?;
        match context.get_mechanism_info(slot, MechanismType::AES_GCM) {
            Ok(_) => {}
            Err(Error::Pkcs11(RvError::MechanismInvalid, _)) => {
                return Err(TokenError::Unfit("its token does not know AES-GCM"));
            }
            Err(error) => return Err(failed(error)),
        }
        let session = context.open_ro_session(slot).map_err(failed)?;
        if context.get_token_info(slot).map_err(failed)?.login_required() {
            login(&session, uri)?;
        }
        let key = key_of(&session, uri)?;
        Ok(Self { session, key })
    }

    fn encrypt(&self, mut nonce: [u8; NONCE_LEN], purpose: &[u8], plain: &[u8]) -> Result<Vec<u8>, Error> {
        let gcm = GcmParams::new(&mut nonce, purpose, 128.into())?;
        self.session.encrypt(&Mechanism::AesGcm(gcm), self.key, plain)
    }

    fn decrypt(&self, mut nonce: [u8; NONCE_LEN], purpose: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
        let gcm = GcmParams::new(&mut nonce, purpose, 128.into())?;
        self.session.decrypt(&Mechanism::AesGcm(gcm), self.key, sealed).map(Zeroizing::new)
    }
}

fn slot_of(context: &Pkcs11, uri: &TokenUri) -> Result<Slot, TokenError> {
    let mut found = Vec::new();
    let mut matching = Vec::new();
    for slot in context.get_slots_with_initialized_token().map_err(failed)? {
        let info = context.get_token_info(slot).map_err(failed)?;
        let is_serial = uri.serial.as_ref().is_none_or(|serial| info.serial_number().trim() == serial);
        if info.label().trim() == uri.token && is_serial {
            matching.push(slot);
        }
        found.push(format!("`{}`", info.label().trim()));
    }
    match matching[..] {
        [slot] => Ok(slot),
        _ => Err(TokenError::NoToken { wanted: uri.token.clone(), found, many: !matching.is_empty() }),
    }
}

fn login(session: &Session, uri: &TokenUri) -> Result<(), TokenError> {
    let pin = pin(uri.pin.as_ref().ok_or(TokenError::NoPin)?)?;
    match session.login(UserType::User, Some(&pin)) {
        Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
        Err(Error::Pkcs11(RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange, _)) => {
            Err(TokenError::WrongPin)
        }
        Err(Error::Pkcs11(RvError::PinLocked, _)) => Err(TokenError::PinLocked),
        Err(error) => Err(failed(error)),
    }
}

/// The first line of where it lies.
fn pin(source: &PinSource) -> Result<AuthPin, TokenError> {
    let unread = |place: String, why: String| TokenError::Pin { place, why };
    let path = match source {
        PinSource::File(path) => path.clone(),
        PinSource::Credential(name) => {
            place::credential(name).map_err(|error: SealingKeyError| unread(name.clone(), error.to_string()))?
        }
    };
    let place = path.display().to_string();
    let bytes = Zeroizing::new(fs::read(&path).map_err(|error: io::Error| unread(place.clone(), error.to_string()))?);
    if bytes.len() > PIN_BYTES_MAX {
        return Err(unread(place, "it is longer than a PIN".to_owned()));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| unread(place.clone(), "it is not UTF-8".to_owned()))?;
    let line =
        text.lines().next().filter(|line| !line.is_empty()).ok_or_else(|| unread(place, "it is empty".to_owned()))?;
    Ok(AuthPin::new(line.into()))
}

fn key_of(session: &Session, uri: &TokenUri) -> Result<ObjectHandle, TokenError> {
    let mut template = vec![Attribute::Class(ObjectClass::SECRET_KEY)];
    template.extend(uri.object.iter().map(|label| Attribute::Label(label.clone().into_bytes())));
    template.extend(uri.id.iter().map(|id| Attribute::Id(id.clone())));
    let found = session.find_objects(&template).map_err(failed)?;
    let &[key] = &found[..] else {
        let wanted = uri.object.clone().unwrap_or_else(|| hex::encode(uri.id.clone().unwrap_or_default()));
        return Err(TokenError::NoKey { wanted, many: !found.is_empty() });
    };
    let asked = [
        AttributeType::KeyType,
        AttributeType::ValueLen,
        AttributeType::Extractable,
        AttributeType::Sensitive,
        AttributeType::Encrypt,
        AttributeType::Decrypt,
    ];
    for attribute in session.get_attributes(key, &asked).map_err(failed)? {
        match attribute {
            Attribute::KeyType(KeyType::AES) => {}
            Attribute::KeyType(_) => return Err(TokenError::Unfit("it is not an AES key")),
            Attribute::ValueLen(length) if u64::from(length) != KEY_BYTES as u64 => {
                return Err(TokenError::Unfit("it has not 256 bits"));
            }
            Attribute::Extractable(true) | Attribute::Sensitive(false) => {
                return Err(TokenError::Unfit("it can leave the token: it has to be sensitive and not extractable"));
            }
            Attribute::Encrypt(false) | Attribute::Decrypt(false) => {
                return Err(TokenError::Unfit("it does not encrypt and decrypt"));
            }
            _ => {}
        }
    }
    Ok(key)
}

fn failed(error: Error) -> TokenError {
    TokenError::Failed(error.to_string())
}
