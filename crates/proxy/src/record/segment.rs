//! Kept records as files: `<number>.records`, each with its magic, whose it is, and entries in the order in which they
//! were written. Whole entries only; a process that dies in the middle of a write leaves a torn tail, which readers skip
//! and no later process appends to. The oldest file goes when a new one is due.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufReader, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use countersign_api::local::RecordFilter;
use countersign_core::{
    identity::InstanceId,
    record::{DecisionRecord, Judged},
};

use super::{
    QUERY_RECORDS_DEFAULT, QUERY_RECORDS_MAX,
    entry::{self, DecisionView, ENTRY_BYTES_MAX, FRAME_BYTES, Payload},
};
use crate::decided::DecisionId;

/// Least room for all segments together, in bytes: each must hold the longest entry.
pub const BYTES_MIN: u64 = 8 * 2 * ENTRY_BYTES_MAX as u64;
/// Segments that share the room.
const SEGMENTS: u64 = 8;
/// Files, whatever their size: a process that dies again and again leaves many small ones.
const FILES_MAX: usize = 64;
const MAGIC: &[u8; 8] = b"csrecs1\n";
const EXTENSION: &str = "records";

/// The segments of one directory, as their only writer sees them.
pub(super) struct Segments {
    dir: PathBuf,
    bytes_max: u64,
    head: Vec<u8>,
    open: Option<Open>,
}

struct Open {
    file: File,
    bytes: u64, // of whole entries, with the head
}

impl Segments {
    pub fn new(dir: PathBuf, bytes_max: u64, instance: &InstanceId) -> Self {
        let mut head = MAGIC.to_vec();
        head.extend_from_slice(&entry::encode_segment(instance));
        Self { dir, bytes_max: bytes_max.max(BYTES_MIN), head, open: None }
    }

    /// Appends sealed entries. On an error some may have been written, but none in part.
    pub fn write(&mut self, mut entries: &[u8]) -> io::Result<()> {
        while !entries.is_empty() {
            let segment_bytes_max = self.bytes_max / SEGMENTS;
            let open = match &mut self.open {
                Some(open) => open,
                None => self.open.insert(begin(&self.dir, self.bytes_max, &self.head)?),
            };
            let fitting = whole_entries(entries, segment_bytes_max.saturating_sub(open.bytes));
            if fitting == 0 {
                self.open = None; // full: the next one begins
                continue;
            }
            let (now, later) = entries.split_at(fitting);
            if let Err(error) = open.file.write_all(now) {
                let _ = open.file.set_len(open.bytes); // what remains is a torn tail that readers skip
                self.open = None;
                return Err(error);
            }
            open.bytes += now.len() as u64;
            entries = later;
        }
        Ok(())
    }

    /// Begins a segment if none is open: whether the directory can be written.
    pub fn prepare(&mut self) -> io::Result<()> {
        if self.open.is_none() {
            self.open = Some(begin(&self.dir, self.bytes_max, &self.head)?);
        }
        Ok(())
    }
}

/// Makes room for a segment and begins it.
fn begin(dir: &Path, bytes_max: u64, head: &[u8]) -> io::Result<Open> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mut numbers = list(dir)?;
    let size = |number: &u64| fs::metadata(path(dir, *number)).map_or(0, |file| file.len());
    let mut bytes: u64 = numbers.iter().map(size).sum();
    let next = numbers.last().map_or(1, |last| last + 1);
    while !numbers.is_empty() && (bytes + bytes_max / SEGMENTS > bytes_max || numbers.len() >= FILES_MAX) {
        let oldest = numbers.remove(0);
        bytes -= size(&oldest);
        fs::remove_file(path(dir, oldest))?;
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path(dir, next))?;
    if let Err(error) = file.write_all(head) {
        let _ = fs::remove_file(path(dir, next));
        return Err(error);
    }
    Ok(Open { file, bytes: head.len() as u64 })
}

/// The length of the longest run of whole entries that fits into `room`.
fn whole_entries(entries: &[u8], room: u64) -> usize {
    let mut end = 0;
    while let Some(frame) = entries[end..].first_chunk::<FRAME_BYTES>() {
        let Some(payload) = entry::payload_bytes(frame) else { break };
        if (end + FRAME_BYTES + payload) as u64 > room {
            break;
        }
        end += FRAME_BYTES + payload;
    }
    end
}

/// The numbers of the segments, oldest first.
fn list(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for file in fs::read_dir(dir)? {
        let path = PathBuf::from(file?.file_name());
        if path.extension().is_some_and(|extension| extension == EXTENSION) {
            numbers.extend(path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok()));
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:012}.{EXTENSION}"))
}

/// The newest records that match, newest first.
pub(super) fn read(dir: &Path, instance: &InstanceId, filter: &RecordFilter) -> io::Result<Vec<DecisionRecord>> {
    let limit = filter.limit.unwrap_or(QUERY_RECORDS_DEFAULT).min(QUERY_RECORDS_MAX) as usize;
    // An exchange that stayed open long is written late, so the newest decision can stand in any segment; what became of
    // it stands after it. One pass forward with the newest so far in hand finds both.
    let mut newest: BTreeMap<DecisionId, DecisionRecord> = BTreeMap::new();
    let numbers = match list(dir) {
        Ok(numbers) => numbers,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    for number in numbers {
        let file = match File::open(path(dir, number)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // made room for a newer one
            Err(error) => return Err(error),
        };
        let mut of = instance.clone();
        each_entry(BufReader::with_capacity(64 * 1024, file), |payload| match payload {
            Payload::Segment(given) => of = InstanceId::parse(given).unwrap_or_else(|_| instance.clone()),
            Payload::Decision(view) if matches(&view, filter) => {
                newest.extend(view.record(&of).map(|record| (view.id, record)));
                if newest.len() > limit {
                    newest.pop_first();
                }
            }
            Payload::Decision(_) => {}
            Payload::End(id, ended) => {
                if let Some(record) = newest.get_mut(&id) {
                    record.ended = Some(ended);
                }
            }
        })?;
    }
    Ok(newest.into_values().rev().collect())
}

/// Shows each whole entry of a segment; stops in silence at the first that is torn, damaged or of another version.
fn each_entry(mut from: impl Read, mut see: impl FnMut(Payload<'_>)) -> io::Result<()> {
    let mut magic = [0; MAGIC.len()];
    if !fill(&mut from, &mut magic)? || magic != *MAGIC {
        return Ok(());
    }
    let mut frame = [0; FRAME_BYTES];
    let mut payload = Vec::new();
    while fill(&mut from, &mut frame)? {
        let Some(bytes) = entry::payload_bytes(&frame) else { break };
        payload.resize(bytes, 0);
        if !fill(&mut from, &mut payload)? || !entry::is_whole(&frame, &payload) {
            break;
        }
        match Payload::read(&payload) {
            Some(payload) => see(payload),
            None => break,
        }
    }
    Ok(())
}

/// Fills `to`; false at the end of the file.
fn fill(from: &mut impl Read, to: &mut [u8]) -> io::Result<bool> {
    match from.read_exact(to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn matches(view: &DecisionView<'_>, filter: &RecordFilter) -> bool {
    let Some((principal, service, _)) = view.edge_names() else { return false };
    let is_principal = |given: &String| {
        principal == given
            || principal
                .strip_suffix(given.as_str())
                .is_some_and(|before| before.matches('/').count() == 3 && before.ends_with('/'))
    };
    let is_asked_for = view.judged != Judged::AsProbe || filter.probes || filter.id.is_some();
    is_asked_for
        && (view.first_contact || !filter.first_contact)
        && filter.outcome.is_none_or(|outcome| outcome == view.outcome)
        && filter.since_ms.is_none_or(|since_ms| since_ms <= view.at_ms)
        && filter.service.as_ref().is_none_or(|given| given.as_str() == service)
        && filter.principal.as_ref().is_none_or(is_principal)
        && filter.id.as_ref().is_none_or(|id| view.id.to_string().starts_with(id.as_str()))
}
