//! Which key of which token of which module: a PKCS #11 URI (RFC 7512). A PIN is never in it, only where it lies.

use std::{fmt, path::PathBuf, str::FromStr};

/// What the URI names, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenUri {
    text: String,
    pub(super) token: String,
    pub(super) serial: Option<String>,
    pub(super) object: Option<String>,
    pub(super) id: Option<Vec<u8>>,
    pub(super) module_path: PathBuf,
    pub(super) pin: Option<PinSource>,
}

/// Where the PIN is read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PinSource {
    File(PathBuf),
    Credential(String),
}

/// Why it names no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TokenUriError(String);

impl FromStr for TokenUri {
    type Err = TokenUriError;

    fn from_str(text: &str) -> Result<Self, TokenUriError> {
        let refuse = |what: &str| Err(TokenUriError(what.to_owned()));
        // Before anything is kept of it, and without repeating it.
        if text.split(['?', '&']).any(|attribute| attribute.starts_with("pin-value")) {
            return refuse("a PIN does not stand in the URI: say where it lies, with `pin-source=file:/PATH`");
        }
        let Some(rest) = text.strip_prefix("pkcs11:") else {
            return refuse("it begins with `pkcs11:`");
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (mut token, mut serial, mut object, mut id) = (None, None, None, None);
        for attribute in path.split(';').filter(|attribute| !attribute.is_empty()) {
            let (name, value) = split(attribute)?;
            let known = match name {
                "token" => token.replace(utf8(name, value)?).is_some(),
                "serial" => serial.replace(utf8(name, value)?).is_some(),
                "object" => object.replace(utf8(name, value)?).is_some(),
                "id" => id.replace(decode(value)?).is_some(),
                "type" if value == "secret-key" => false,
                _ => {
                    return Err(TokenUriError(format!(
                        "`{name}` is not one of token, serial, object, id, type=secret-key"
                    )));
                }
            };
            if known {
                return Err(TokenUriError(format!("`{name}` stands in it twice")));
            }
        }
        let (mut module_path, mut pin) = (None, None);
        for attribute in query.split('&').filter(|attribute| !attribute.is_empty()) {
            let (name, value) = split(attribute)?;
            let value = utf8(name, value)?;
            let known = match name {
                "module-path" => module_path.replace(PathBuf::from(value)).is_some(),
                "pin-source" => pin.replace(pin_source(&value)?).is_some(),
                _ => return Err(TokenUriError(format!("`{name}` is not one of module-path, pin-source"))),
            };
            if known {
                return Err(TokenUriError(format!("`{name}` stands in it twice")));
            }
        }
        let Some(token) = token else { return refuse("it names no token: `token=LABEL`") };
        if object.is_none() && id.is_none() {
            return refuse("it names no key: `object=LABEL`, or `id=%01`");
        }
        let Some(module_path) = module_path.filter(|path: &PathBuf| path.is_absolute()) else {
            return refuse("it names no module by a whole path: `module-path=/usr/lib/…/module.so`");
        };
        Ok(Self { text: text.to_owned(), token, serial, object, id, module_path, pin })
    }
}

fn pin_source(value: &str) -> Result<PinSource, TokenUriError> {
    let path = value.strip_prefix("file:").map_or(value, |path| path.strip_prefix("//").unwrap_or(path));
    match value.strip_prefix("credential:") {
        Some(name) => Ok(PinSource::Credential(name.to_owned())),
        None if path.starts_with('/') => Ok(PinSource::File(path.into())),
        None => Err(TokenUriError("a PIN lies at `pin-source=file:/PATH` or `pin-source=credential:NAME`".to_owned())),
    }
}

fn split(attribute: &str) -> Result<(&str, &str), TokenUriError> {
    attribute.split_once('=').ok_or_else(|| TokenUriError("an attribute has no `=`".to_owned()))
}

fn utf8(name: &str, value: &str) -> Result<String, TokenUriError> {
    String::from_utf8(decode(value)?).map_err(|_| TokenUriError(format!("`{name}` is not UTF-8")))
}

/// `pct-encoded` (RFC 3986, 2.1).
fn decode(value: &str) -> Result<Vec<u8>, TokenUriError> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let [first, after @ ..] = rest {
        rest = match (first, after) {
            (b'%', [high, low, after @ ..]) => {
                let byte =
                    hex::decode([*high, *low]).map_err(|_| TokenUriError("a `%` has no two digits".to_owned()))?;
                bytes.extend(byte);
                after
            }
            (b'%', _) => return Err(TokenUriError("a `%` has no two digits".to_owned())),
            (byte, after) => {
                bytes.push(*byte);
                after
            }
        };
    }
    Ok(bytes)
}

impl fmt::Display for TokenUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_names_module_token_key_and_where_the_pin_lies() {
        let uri: TokenUri =
            "pkcs11:token=my%20mesh;object=kek;id=%01%ff;type=secret-key?module-path=/usr/lib/m.so&pin-source=file:/run/pin"
                .parse()
                .unwrap();
        assert_eq!(
            (uri.token.as_str(), uri.object.as_deref(), uri.id.as_deref()),
            ("my mesh", Some("kek"), Some(&[1, 255][..]))
        );
        assert_eq!((uri.module_path, uri.pin), ("/usr/lib/m.so".into(), Some(PinSource::File("/run/pin".into()))));
        for (source, expected) in [
            ("file:///run/pin", PinSource::File("/run/pin".into())),
            ("/run/pin", PinSource::File("/run/pin".into())),
            ("credential:pin", PinSource::Credential("pin".into())),
        ] {
            let uri = format!("pkcs11:token=t;object=k?module-path=/m.so&pin-source={source}");
            assert_eq!(uri.parse::<TokenUri>().unwrap().pin, Some(expected), "{source}");
        }
    }

    #[test]
    fn what_names_no_key_or_holds_a_pin_is_refused_and_no_pin_is_repeated() {
        for (uri, why) in [
            ("kek", "begins with `pkcs11:`"),
            ("pkcs11:object=k?module-path=/m.so", "names no token"),
            ("pkcs11:token=t?module-path=/m.so", "names no key"),
            ("pkcs11:token=t;object=k", "names no module"),
            ("pkcs11:token=t;object=k?module-path=m.so", "names no module"),
            ("pkcs11:token=t;object=k;object=l?module-path=/m.so", "twice"),
            ("pkcs11:token=t;object=k;colour=red?module-path=/m.so", "`colour` is not one of"),
            ("pkcs11:token=t;object=k?module-name=m", "`module-name` is not one of"),
            ("pkcs11:token=t;object=k?module-path=/m.so&pin-source=pin", "a PIN lies at"),
            ("pkcs11:token=%4;object=k?module-path=/m.so", "no two digits"),
            ("pkcs11:token=%ff;object=k?module-path=/m.so", "not UTF-8"),
            ("pkcs11:token;object=k?module-path=/m.so", "no `=`"),
            ("pkcs11:token=t;object=k?module-path=/m.so&pin-value=4711", "a PIN does not stand in the URI"),
            ("pkcs11:token=t;object=k?pin-value=4711", "a PIN does not stand in the URI"),
        ] {
            let refused = uri.parse::<TokenUri>().unwrap_err().to_string();
            assert!(refused.contains(why) && !refused.contains("4711"), "{uri}: {refused}");
        }
    }
}
