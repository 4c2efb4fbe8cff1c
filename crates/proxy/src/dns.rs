//! The DNS of a workload's namespace: `<service>.mesh` is the loopback address on which the sidecar listens for that
//! service. Knows nothing else, forwards nothing, keeps nothing; every question is answered from the view in force.

use std::{io, net::Ipv4Addr, time::Duration};

use simple_dns::{
    CLASS, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE, header_buffer,
    rdata::RData,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};

/// How long an answer may be kept, in seconds: a service that comes or goes is seen at once.
const TTL_SECONDS: u32 = 1;
/// Longest question we read, in bytes; RFC 6891 section 6.2.5 has resolvers assume no more of us.
const QUESTION_BYTES_MAX: usize = 4096;
/// Connections open at once; TCP is for the few resolvers that insist.
const CONNECTIONS_MAX: usize = 16;
/// How long a connection may be silent.
const SILENT_MAX: Duration = Duration::from_secs(5);
/// The domain of the mesh.
const DOMAIN: &[u8] = b"mesh";

/// Answers the questions that arrive at `socket` until the task is aborted. `lookup` is given a service's name in lower
/// case.
pub async fn serve_udp(socket: UdpSocket, lookup: impl Fn(&str) -> Option<Ipv4Addr>) {
    let mut question = [0; QUESTION_BYTES_MAX];
    loop {
        match socket.recv_from(&mut question).await {
            Ok((length, from)) => {
                if let Some(answer) = answer(&question[..length], &lookup) {
                    // A full or vanished receiver asks again: it is a datagram.
                    let _ = socket.try_send_to(&answer, from);
                }
            }
            // An ICMP error about an earlier answer, or no memory: neither says anything about the next question.
            Err(error) => {
                tracing::debug!(%error, "could not receive a DNS question");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

/// The same over TCP: RFC 1035 section 4.2.2, two bytes of length before each message.
pub async fn serve_tcp(
    listener: TcpListener,
    lookup: impl Fn(&str) -> Option<Ipv4Addr> + Clone + Send + Sync + 'static,
) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let lookup = lookup.clone();
                connections.spawn(async move {
                    let _ = converse(stream, lookup).await; // it hung up, or spoke nonsense
                });
            }
            Err(error) => {
                tracing::debug!(%error, "could not accept a DNS connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn converse(mut stream: TcpStream, lookup: impl Fn(&str) -> Option<Ipv4Addr>) -> io::Result<()> {
    loop {
        let question = async {
            let length = usize::from(stream.read_u16().await?);
            if length > QUESTION_BYTES_MAX {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            let mut question = vec![0; length];
            stream.read_exact(&mut question).await.map(|_| question)
        };
        let question = tokio::time::timeout(SILENT_MAX, question).await??;
        let Some(answer) = answer(&question, &lookup) else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        let mut packet = length.to_be_bytes().to_vec();
        packet.extend(answer);
        tokio::time::timeout(SILENT_MAX, stream.write_all(&packet)).await??;
    }
}

/// The answer to one message; `None` to one that is no question: answering an answer could go on for ever.
pub(crate) fn answer(message: &[u8], lookup: impl Fn(&str) -> Option<Ipv4Addr>) -> Option<Vec<u8>> {
    let is_answer = header_buffer::has_flags(message, PacketFlag::RESPONSE).ok()?;
    if is_answer {
        return None;
    }
    let mut reply = Packet::new_reply(header_buffer::id(message).ok()?);
    match Packet::parse(message) {
        Ok(asked) => {
            *reply.opcode_mut() = asked.opcode();
            if asked.has_flags(PacketFlag::RECURSION_DESIRED) {
                reply.set_flags(PacketFlag::RECURSION_DESIRED);
            }
            match (asked.opcode(), asked.questions.as_slice()) {
                (OPCODE::StandardQuery, [question]) => resolve(question, lookup, &mut reply),
                // RFC 9619: a query with another number of questions is a format error.
                (OPCODE::StandardQuery, _) => *reply.rcode_mut() = RCODE::FormatError,
                _ => *reply.rcode_mut() = RCODE::NotImplemented,
            }
            reply.build_bytes_vec_compressed().ok()
        }
        Err(_) => {
            *reply.rcode_mut() = RCODE::FormatError;
            reply.build_bytes_vec().ok()
        }
    }
}

fn resolve(question: &Question<'_>, lookup: impl Fn(&str) -> Option<Ipv4Addr>, reply: &mut Packet<'_>) {
    reply.questions.push(question.clone().into_owned());
    let labels: Vec<&[u8]> = question.qname.as_bytes().collect();
    let ours = labels.last().is_some_and(|last| last.eq_ignore_ascii_case(DOMAIN));
    if !ours || !matches!(question.qclass, QCLASS::CLASS(CLASS::IN) | QCLASS::ANY) {
        *reply.rcode_mut() = RCODE::Refused;
        return;
    }
    reply.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    let address = match labels.as_slice() {
        [_domain] => return, // it exists and has no address
        [service, _domain] => str::from_utf8(service).ok().and_then(|service| lookup(&service.to_ascii_lowercase())),
        _ => None,
    };
    match (address, question.qtype) {
        (None, _) => *reply.rcode_mut() = RCODE::NameError,
        (Some(address), QTYPE::TYPE(TYPE::A) | QTYPE::ANY) => {
            let name = question.qname.clone().into_owned();
            reply.answers.push(ResourceRecord::new(name, CLASS::IN, TTL_SECONDS, RData::A(address.into())));
        }
        // RFC 2308 section 2.2: the name exists, this type of it does not. An AAAA that were answered NXDOMAIN would
        // take the A with it.
        (Some(_), _) => {}
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use proptest::prelude::*;
    use simple_dns::Name;

    use super::*;

    fn known(service: &str) -> Option<Ipv4Addr> {
        (service == "ledger").then_some(Ipv4Addr::new(127, 81, 1, 7))
    }

    fn ask(name: &str, qtype: QTYPE, qclass: QCLASS) -> Vec<u8> {
        let mut query = Packet::new_query(42);
        query.set_flags(PacketFlag::RECURSION_DESIRED);
        query.questions.push(Question::new(Name::new(name).unwrap().into_owned(), qtype, qclass, false));
        query.build_bytes_vec().unwrap()
    }

    fn told(answer: &[u8]) -> String {
        let answer = Packet::parse(answer).unwrap();
        assert_eq!(answer.id(), 42);
        let addresses = answer.answers.iter().map(|record| match &record.rdata {
            RData::A(a) => format!(" {} ttl {}", Ipv4Addr::from(a.address), record.ttl),
            other => format!(" {other:?}"),
        });
        format!("{:?}{}", answer.rcode(), addresses.collect::<String>())
    }

    #[test]
    fn only_services_of_the_mesh_have_an_answer() {
        let a = QTYPE::TYPE(TYPE::A);
        let aaaa = QTYPE::TYPE(TYPE::AAAA);
        let internet = QCLASS::CLASS(CLASS::IN);
        let check = |name: &str, qtype: QTYPE, qclass: QCLASS, expected: Expect| {
            expected.assert_eq(&told(&answer(&ask(name, qtype, qclass), known).unwrap()));
        };
        check("example.com", a, internet, expect!["Refused"]);
        check("mesh.example.com", a, internet, expect!["Refused"]);
        check("ledger.mesh", a, QCLASS::CLASS(CLASS::CH), expect!["Refused"]);
        check("unknown.mesh", a, internet, expect!["NameError"]);
        check("a.ledger.mesh", a, internet, expect!["NameError"]);
        check("mesh", a, internet, expect!["NoError"]);
        check("ledger.mesh", aaaa, internet, expect!["NoError"]);
        check("unknown.mesh", aaaa, internet, expect!["NameError"]);
        check("ledger.mesh", a, internet, expect!["NoError 127.81.1.7 ttl 1"]);
        check("LeDGer.MESH", a, internet, expect!["NoError 127.81.1.7 ttl 1"]);
    }

    #[test]
    fn an_answer_is_never_answered_and_nonsense_is_a_format_error() {
        let mut reply = ask("ledger.mesh", QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN));
        reply[2] |= 0x80;
        assert_eq!(answer(&reply, known), None);
        assert_eq!(answer(&[0; 5], known), None);
        let mut two = Packet::new_query(42);
        for _ in 0..2 {
            let name = Name::new("ledger.mesh").unwrap();
            two.questions.push(Question::new(name, QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN), false));
        }
        assert_eq!(told(&answer(&two.build_bytes_vec().unwrap(), known).unwrap()), "FormatError");
        let cut = &ask("ledger.mesh", QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN))[..18];
        assert_eq!(told(&answer(cut, known).unwrap()), "FormatError");
    }

    proptest! {
        #[test]
        fn no_change_of_a_question_makes_it_panic(at in 0usize..29, to in any::<u8>()) {
            let mut message = ask("ledger.mesh", QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN));
            message[at] = to;
            let _ = answer(&message, known);
        }
    }

    #[tokio::test]
    async fn both_transports_answer_and_a_silent_connection_does_not_hold_the_rest() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (udp_address, tcp_address) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
        let serving = [tokio::spawn(serve_udp(udp, known)), tokio::spawn(serve_tcp(tcp, known))];
        let question = ask("ledger.mesh", QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN));

        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(&question, udp_address).await.unwrap();
        let mut received = [0; 512];
        let (length, _) = client.recv_from(&mut received).await.unwrap();
        assert_eq!(told(&received[..length]), "NoError 127.81.1.7 ttl 1");

        let _silent = TcpStream::connect(tcp_address).await.unwrap();
        let mut stream = TcpStream::connect(tcp_address).await.unwrap();
        for _ in 0..2 {
            stream.write_u16(question.len() as u16).await.unwrap();
            stream.write_all(&question).await.unwrap();
            let length = usize::from(stream.read_u16().await.unwrap());
            let mut received = vec![0; length];
            stream.read_exact(&mut received).await.unwrap();
            assert_eq!(told(&received), "NoError 127.81.1.7 ttl 1");
        }
        serving.iter().for_each(|task| task.abort());
    }
}
