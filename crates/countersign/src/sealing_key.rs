//! Where the key that seals all other keys comes from, as the command line names it. Never the key, nor a PIN.

use std::path::{Path, PathBuf, absolute};

use clap::Args;

use countersign_api::local::KeyPlace;
use countersign_control::authority::seal::TokenUri;

use crate::error::Failure;

/// For what serves.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct SealingKeyArguments {
    /// A file of mode 0600 whose key seals all other keys [default: one in the data directory]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A credential of systemd (`LoadCredentialEncrypted=NAME:…`) whose key seals all other keys
    #[arg(long, value_name = "NAME")]
    pub key_credential: Option<String>,
    /// An AES-256 key in a security module that seals all other keys and never leaves it, by its PKCS#11 URI
    ///
    /// 'pkcs11:token=LABEL;object=LABEL?module-path=/PATH.so&pin-source=file:/PATH'; or `pin-source=credential:NAME`.
    #[arg(long, value_name = "URI", value_parser = token_uri)]
    pub key_pkcs11: Option<String>,
}

/// For what puts another one in its place.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct NextSealingKeyArguments {
    /// A file of mode 0600; made when it is not there
    #[arg(long, value_name = "FILE")]
    pub new_key_file: Option<PathBuf>,
    /// A credential of systemd that the running control plane was given
    #[arg(long, value_name = "NAME")]
    pub new_key_credential: Option<String>,
    /// An AES-256 key in a security module, by its PKCS#11 URI
    #[arg(long, value_name = "URI", value_parser = token_uri)]
    pub new_key_pkcs11: Option<String>,
}

impl SealingKeyArguments {
    /// The one that is named.
    pub fn place(self) -> Result<Option<KeyPlace>, Failure> {
        place(self.key_file, self.key_credential, self.key_pkcs11)
    }
}

impl NextSealingKeyArguments {
    /// The one that is named.
    pub fn place(self) -> Result<KeyPlace, Failure> {
        let named = place(self.new_key_file, self.new_key_credential, self.new_key_pkcs11)?;
        named.ok_or_else(|| Failure::usage("no new key is named").help("name one: `--new-key-file FILE`"))
    }
}

fn place(
    file: Option<PathBuf>,
    credential: Option<String>,
    pkcs11: Option<String>,
) -> Result<Option<KeyPlace>, Failure> {
    let file = file.map(|file| whole(&file)).transpose()?;
    let named = file.map(KeyPlace::File).or(credential.map(KeyPlace::Credential)).or(pkcs11.map(KeyPlace::Pkcs11));
    Ok(named)
}

/// The same from wherever it is started again.
fn whole(file: &Path) -> Result<PathBuf, Failure> {
    absolute(file).map_err(|e| Failure::new(format!("could not name `{}` in full", file.display())).because(&e))
}

fn token_uri(given: &str) -> Result<String, String> {
    given.parse::<TokenUri>().map(|uri| uri.to_string()).map_err(|error| error.to_string())
}
