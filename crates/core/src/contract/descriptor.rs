//! A protobuf `FileDescriptorSet`, as `protoc --descriptor_set_out` and `buf build -o` write it. Read of it are packages,
//! services and methods, three messages deep; everything else is passed over by its length, so nothing unfolds.

use super::{Contract, DOCUMENT_BYTES_MAX, Operation, contract_of, mistake, shown};
use crate::policy::Mistake;

/// Reads a descriptor set: each method of each service is an operation, `package.Service/Method`.
pub fn read_descriptor_set(bytes: &[u8]) -> Result<Contract, Vec<Mistake>> {
    let help = "write it with `protoc --descriptor_set_out=FILE`, or `buf build -o FILE.binpb`";
    let refused = |what: String, help: &str| Err(vec![mistake(0..0, what, help)]);
    if bytes.len() > DOCUMENT_BYTES_MAX {
        let what = format!("the descriptor set has more than {DOCUMENT_BYTES_MAX} bytes");
        return refused(what, "leave `--include_imports` and `--include_source_info` out: only services are read");
    }
    let mut operations = Vec::new();
    match read_set(bytes, &mut operations) {
        Ok(()) => {
            let spans = vec![0..0; operations.len()];
            contract_of(operations, &spans)
        }
        Err(defect) => refused(format!("this is no descriptor set: {defect}"), help),
    }
}

type Defect = String;

/// descriptor.proto: `FileDescriptorSet.file` = 1.
fn read_set(bytes: &[u8], operations: &mut Vec<Operation>) -> Result<(), Defect> {
    for field in (Fields { rest: bytes }) {
        if let (1, Value::Bytes(file)) = field? {
            read_file(file, operations)?;
        }
    }
    Ok(())
}

/// `FileDescriptorProto`: `package` = 2, `service` = 6.
fn read_file(bytes: &[u8], operations: &mut Vec<Operation>) -> Result<(), Defect> {
    let mut package = "";
    for field in (Fields { rest: bytes }) {
        if let (2, Value::Bytes(name)) = field? {
            package = name_of(name, true)?;
        }
    }
    for field in (Fields { rest: bytes }) {
        if let (6, Value::Bytes(service)) = field? {
            read_service(service, package, operations)?;
        }
    }
    Ok(())
}

/// `ServiceDescriptorProto`: `name` = 1, `method` = 2. `MethodDescriptorProto`: `name` = 1.
fn read_service(bytes: &[u8], package: &str, operations: &mut Vec<Operation>) -> Result<(), Defect> {
    let service = own_name(bytes)?;
    for field in (Fields { rest: bytes }) {
        let (2, Value::Bytes(method)) = field? else { continue };
        let method = own_name(method)?;
        let name = match package {
            "" => format!("{service}/{method}"),
            package => format!("{package}.{service}/{method}"),
        };
        if operations.len() > super::OPERATIONS_MAX {
            return Ok(()); // the contract refuses as many
        }
        // "Path → "/" Service-Name "/" {method name}", and always POST (gRPC over HTTP2).
        let path = format!("/{name}").into();
        operations.push(Operation { name: name.into(), method: "POST".into(), path });
    }
    Ok(())
}

fn own_name(bytes: &[u8]) -> Result<&str, Defect> {
    let mut name = None;
    for field in (Fields { rest: bytes }) {
        if let (1, Value::Bytes(found)) = field? {
            name = Some(name_of(found, false)?);
        }
    }
    name.ok_or_else(|| "a service or method has no name".to_owned())
}

/// A protobuf identifier; `dotted` for a package.
fn name_of(bytes: &[u8], dotted: bool) -> Result<&str, Defect> {
    let name = std::str::from_utf8(bytes).map_err(|_| "a name is not UTF-8".to_owned())?;
    let part = |part: &str| {
        part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && part.bytes().next().is_some_and(|byte| !byte.is_ascii_digit())
    };
    let fits = if dotted { name.is_empty() || name.split('.').all(part) } else { part(name) };
    if fits { Ok(name) } else { Err(format!("`{}` is not a name", shown(name))) }
}

/// The fields of one message, as the wire has them.
struct Fields<'a> {
    rest: &'a [u8],
}

enum Value<'a> {
    Bytes(&'a [u8]),
    /// A number, which nothing here reads.
    Number,
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Value<'a>), Defect>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.rest = &[];
        }
        Some(field.ok_or_else(|| "a message ends before it should, or is none".to_owned()))
    }
}

impl<'a> Fields<'a> {
    /// Groups, deprecated and in no descriptor, are refused: they nest.
    fn field(&mut self) -> Option<(u32, Value<'a>)> {
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).ok().filter(|number| (1..1 << 29).contains(number))?;
        let value = match tag & 7 {
            0 => self.varint().map(|_| Value::Number)?,
            1 => self.take(8).map(|_| Value::Number)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Value::Number)?,
            _ => return None,
        };
        Some((number, value))
    }

    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(bytes)?;
        self.rest = rest;
        Some(taken)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        assert!(content.len() < 1 << 14);
        let length = [content.len() as u8 | 0x80, (content.len() >> 7) as u8];
        [&[number << 3 | 2], &length[..], content].concat()
    }

    /// `package shop; service Orders { rpc Place; rpc Watch; }` and a file without a package, with what is passed over.
    fn set() -> Vec<u8> {
        let method = |name: &[u8]| field(2, &[field(1, name), field(2, b".shop.Order"), vec![5 << 3, 1]].concat());
        let service = field(6, &[field(1, b"Orders"), method(b"Place"), method(b"Watch")].concat());
        let shop = [
            field(1, b"orders.proto"),
            service,
            field(2, b"shop"),
            field(4, b"\xff\xff"),
            vec![1 << 3 | 5, 0, 0, 0, 0],
        ];
        let bare = field(6, &[field(1, b"Health"), method(b"Check")].concat());
        [field(1, &shop.concat()), field(1, &bare), field(15, b"other")].concat()
    }

    fn told(bytes: &[u8]) -> String {
        match read_descriptor_set(bytes) {
            Ok(contract) => contract
                .operations()
                .iter()
                .map(|operation| format!("{} {}; ", operation.name, operation.path))
                .collect(),
            Err(mistakes) => mistakes[0].what.clone(),
        }
    }

    #[test]
    fn every_method_of_every_service_is_an_operation() {
        assert_eq!(
            told(&set()),
            "Health/Check /Health/Check; shop.Orders/Place /shop.Orders/Place; shop.Orders/Watch /shop.Orders/Watch; "
        );
    }

    #[test]
    fn what_is_no_descriptor_set_is_refused() {
        let ends = "this is no descriptor set: a message ends before it should, or is none";
        let service = |content: &[u8]| field(1, &field(6, content));
        for (bytes, expected) in [
            (vec![], "there is no operation in it"),
            (field(1, &field(2, b"shop")), "there is no operation in it"),
            (b"openapi: 3.1.0\n".to_vec(), ends),
            (vec![0], ends),
            (vec![0x80; 11], ends),
            (vec![1 << 3 | 3, 1 << 3 | 4], ends),
            (set()[..60].to_vec(), ends),
            (vec![1 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], ends),
            (service(&field(2, &field(1, b"Place"))), "this is no descriptor set: a service or method has no name"),
            (service(&field(1, b"a/b")), "this is no descriptor set: `a/b` is not a name"),
            (service(&field(1, b"\xff")), "this is no descriptor set: a name is not UTF-8"),
            ([set(), set()].concat(), "the operation `shop.Orders/Place` stands here twice"),
            (vec![0; DOCUMENT_BYTES_MAX + 1], "the descriptor set has more than 1048576 bytes"),
        ] {
            assert_eq!(told(&bytes), expected, "{bytes:.40?}");
        }
    }

    #[test]
    fn a_set_of_more_methods_than_a_contract_holds_is_refused() {
        let method = field(2, &field(1, b"M"));
        let service: Vec<u8> = std::iter::repeat_n(method, 1_000).flatten().collect();
        let service = field(6, &[field(1, b"S"), service].concat());
        let set: Vec<u8> = std::iter::repeat_n(field(1, &service), 20).flatten().collect();
        assert!(read_descriptor_set(&set).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..200, put in any::<u8>()) {
            let _ = read_descriptor_set(&bytes);
            let mut changed = set();
            let at = at % changed.len();
            changed[at] = put;
            let _ = read_descriptor_set(&changed);
            let _ = read_descriptor_set(&changed[..at]);
        }
    }
}
