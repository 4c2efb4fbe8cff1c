//! Reads TOML and keeps account of what is wrong with it. A value that is wrong is reported and then taken as absent, so
//! that one reading finds every mistake.

use std::{
    borrow::Cow,
    cell::RefCell,
    ops::{Range, RangeInclusive},
    sync::Arc,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{FILE_BYTES_MAX, Key, Mistake};
use crate::policy::{self, nearest};

/// A file, with what was found wrong in it so far.
pub(super) struct Source {
    pub(super) file: Arc<str>,
    pub(super) text: Arc<str>,
    mistakes: RefCell<Vec<Mistake>>,
}

/// A TOML table of which every key is known.
pub(super) struct Table<'t> {
    source: &'t Source,
    table: &'t DeTable<'t>,
    /// Where its name stands.
    pub(super) at: Range<usize>,
}

/// A value with its place.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub(super) at: Range<usize>,
    pub(super) value: T,
}

impl Source {
    pub(super) fn new(file: &str, text: &str) -> Self {
        Self { file: file.into(), text: text.into(), mistakes: RefCell::default() }
    }

    pub(super) fn mistake(&self, span: Range<usize>, what: impl Into<String>, help: impl Into<Help>) {
        let (file, text) = (self.file.clone(), self.text.clone());
        self.mistakes.borrow_mut().push(Mistake { file, text, span, what: what.into(), help: help.into().0 });
    }

    pub(super) fn take(&self, mistake: policy::Mistake) {
        self.mistake(mistake.span, mistake.what, Help(mistake.help));
    }

    pub(super) fn into_mistakes(self) -> Vec<Mistake> {
        self.mistakes.into_inner()
    }

    /// The document; `None` when it is no TOML, and then it says in every place why.
    pub(super) fn document(&self) -> Option<Spanned<DeTable<'_>>> {
        if self.text.len() > FILE_BYTES_MAX {
            self.mistake(0..0, format!("the file has more than {FILE_BYTES_MAX} bytes"), Help(None));
            return None;
        }
        let (document, errors) = DeTable::parse_recoverable(&self.text);
        for error in &errors {
            self.mistake(error.span().unwrap_or(0..0), error.message().trim_end().to_owned(), Help(None));
        }
        errors.is_empty().then_some(document)
    }
}

/// How to mend a mistake.
pub(super) struct Help(pub(super) Option<String>);

impl From<&str> for Help {
    fn from(help: &str) -> Self {
        Self(Some(help.to_owned()))
    }
}

impl From<String> for Help {
    fn from(help: String) -> Self {
        Self(Some(help))
    }
}

/// `did you mean …?` when something is near, or else what there is.
pub(super) fn suggest<'a>(given: &str, names: impl Iterator<Item = &'a str> + Clone) -> Help {
    let meant = nearest(given, names.clone()).map(|meant| format!("did you mean `{meant}`?"));
    let few = || -> Option<String> {
        let few: Vec<_> = names.clone().take(21).map(|name| format!("`{name}`")).collect();
        (2..=20).contains(&few.len()).then(|| format!("there are {}", few.join(", ")))
    };
    Help(meant.or_else(few))
}

impl<'t> Table<'t> {
    /// Takes up a table and refuses the keys that are not among `keys`.
    pub(super) fn new(source: &'t Source, table: &'t DeTable<'t>, at: Range<usize>, keys: &[Key]) -> Self {
        for name in table.keys().filter(|name| !keys.iter().any(|key| key.name == &**name.get_ref())) {
            let given: &str = name.get_ref();
            source.mistake(
                name.span(),
                format!("unknown key `{given}`"),
                suggest(given, keys.iter().map(|key| key.name)),
            );
        }
        Self { source, table, at }
    }

    pub(super) fn source(&self) -> &'t Source {
        self.source
    }

    pub(super) fn get(&self, key: &str) -> Option<&'t Spanned<DeValue<'t>>> {
        self.table.iter().find(|(name, _)| *name.get_ref() == key).map(|(_, value)| value)
    }

    /// Where `key` stands, or the table when it is absent.
    pub(super) fn at_key(&self, key: &str) -> Range<usize> {
        self.table.keys().find(|name| *name.get_ref() == key).map_or_else(|| self.at.clone(), Spanned::span)
    }

    pub(super) fn mistake(&self, span: Range<usize>, what: impl Into<String>, help: impl Into<Help>) {
        self.source.mistake(span, what, help);
    }

    /// A table whose keys are known.
    pub(super) fn table(&self, key: &str, keys: &[Key]) -> Option<Table<'t>> {
        let value = self.get(key)?;
        let table = as_table(self.source, key, value)?;
        Some(Table::new(self.source, table, self.at_key(key), keys))
    }

    /// The members of a table whose keys the user names, in the order of the file.
    pub(super) fn members(&self, key: &str) -> Option<Vec<(At<&'t str>, &'t Spanned<DeValue<'t>>)>> {
        let table = as_table(self.source, key, self.get(key)?)?;
        let at = |name: &'t Spanned<Cow<'t, str>>| At { at: name.span(), value: &**name.get_ref() };
        let mut members: Vec<_> = table.iter().map(|(name, value)| (at(name), value)).collect();
        members.sort_by_key(|(name, _)| name.at.start);
        Some(members)
    }

    pub(super) fn string(&self, key: &str) -> Option<At<&'t str>> {
        as_string(self.source, key, self.get(key)?)
    }

    pub(super) fn strings(&self, key: &str) -> Option<Vec<At<&'t str>>> {
        let value = self.get(key)?;
        let Some(array) = value.get_ref().as_array() else {
            self.mistake(value.span(), format!("`{key}` must be an array of strings"), example_array(value.get_ref()));
            return None;
        };
        let each = format!("{key}[…]");
        Some(array.iter().filter_map(|value| as_string(self.source, &each, value)).collect())
    }

    /// A whole number within `range`.
    pub(super) fn whole(&self, key: &str, range: RangeInclusive<u64>) -> Option<u64> {
        as_whole(self.source, key, self.get(key)?, range)
    }

    /// A duration within `range`, in milliseconds.
    pub(super) fn duration_ms(&self, key: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let given = self.string(key)?;
        let between = format!("give {} to {}, like \"{}\"", show_ms(*range.start()), show_ms(*range.end()), "30s");
        match duration_ms(given.value) {
            Some(found) if range.contains(&found) => Some(found),
            Some(_) => {
                self.mistake(given.at, format!("`{key}` is out of bounds"), between);
                None
            }
            None => {
                let help = format!("write a number with `ms`, `s`, `m` or `h`; {between}");
                self.mistake(given.at, format!("`{}` is not a duration", shortened(given.value)), help);
                None
            }
        }
    }

    /// A number of days within `range`, like `90d`.
    pub(super) fn days(&self, key: &str, range: RangeInclusive<u32>) -> Option<u32> {
        let given = self.string(key)?;
        let found = given.value.strip_suffix('d').and_then(|number| number.parse().ok());
        let help = format!("give {}d to {}d, like \"90d\"", range.start(), range.end());
        match found {
            Some(found) if range.contains(&found) => Some(found),
            Some(_) => {
                self.mistake(given.at, format!("`{key}` is out of bounds"), help);
                None
            }
            None => {
                self.mistake(given.at, format!("`{}` is not a number of days", shortened(given.value)), help);
                None
            }
        }
    }

    /// One of a few words.
    pub(super) fn word<T: Copy>(&self, key: &str, words: &[(&'static str, T)]) -> Option<T> {
        let given = self.string(key)?;
        let found = words.iter().find(|(word, _)| *word == given.value).map(|(_, value)| *value);
        if found.is_none() {
            let what = format!("`{key}` cannot be `{}`", shortened(given.value));
            self.mistake(given.at, what, suggest(given.value, words.iter().map(|(word, _)| *word)));
        }
        found
    }
}

pub(super) fn as_table<'t>(source: &Source, key: &str, value: &'t Spanned<DeValue<'t>>) -> Option<&'t DeTable<'t>> {
    let table = value.get_ref().as_table();
    if table.is_none() {
        let what = format!("`{key}` must be a table, not {}", kind(value.get_ref()));
        source.mistake(value.span(), what, Help(None));
    }
    table
}

pub(super) fn as_string<'t>(source: &Source, key: &str, value: &'t Spanned<DeValue<'t>>) -> Option<At<&'t str>> {
    match value.get_ref() {
        DeValue::String(text) => Some(At { at: value.span(), value: text }),
        other => {
            let written = source.text.get(value.span()).filter(|text| text.len() <= 40 && !text.contains(['\n', '"']));
            let help = Help(written.map(|text| format!("put it in quotes: \"{text}\"")));
            source.mistake(value.span(), format!("`{key}` must be a string, not {}", kind(other)), help);
            None
        }
    }
}

pub(super) fn as_whole(
    source: &Source,
    key: &str,
    value: &Spanned<DeValue<'_>>,
    range: RangeInclusive<u64>,
) -> Option<u64> {
    let help = format!("give {} to {}", range.start(), range.end());
    let DeValue::Integer(number) = value.get_ref() else {
        let what = format!("`{key}` must be a whole number, not {}", kind(value.get_ref()));
        source.mistake(value.span(), what, help);
        return None;
    };
    let found = u64::from_str_radix(number.as_str(), number.radix()).ok().filter(|found| range.contains(found));
    if found.is_none() {
        source.mistake(value.span(), format!("`{key}` is out of bounds"), help);
    }
    found
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "a truth value",
        DeValue::Datetime(_) => "a time",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

fn example_array(value: &DeValue<'_>) -> Help {
    Help(value.as_str().map(|text| {
        let words: Vec<_> = text.split_whitespace().map(|word| format!("{word:?}")).collect();
        format!("write [{}]", words.join(", "))
    }))
}

/// `250ms`, `30s`, `5m`, `1h`.
fn duration_ms(given: &str) -> Option<u64> {
    let (number, unit) = given.split_at(given.find(|c: char| !c.is_ascii_digit())?);
    let factor = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn show_ms(ms: u64) -> String {
    match ms {
        _ if ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
        _ if ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
        _ if ms.is_multiple_of(1_000) => format!("{}s", ms / 1_000),
        _ => format!("{ms}ms"),
    }
}

/// What was given, short enough for a line.
pub(super) fn shortened(given: &str) -> Cow<'_, str> {
    match given.char_indices().nth(60) {
        Some((at, _)) => Cow::Owned(format!("{}…", &given[..at])),
        None => Cow::Borrowed(given),
    }
}

/// Whether `given` is fit for the name of a role, a route, a namespace, a sensitivity, an issuer or a pipeline.
pub(crate) fn is_plain_name(given: &str) -> bool {
    (1..=64).contains(&given.len())
        && given.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// What [`is_plain_name`] asks for.
pub(crate) const PLAIN_NAME: &str = "use 1 to 64 letters, digits, `-`, `_` and `.`";
