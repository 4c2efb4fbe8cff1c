//! What the environment says about the export, under the names that OpenTelemetry gives it. Read once, at the start; what
//! cannot be meant is refused then, with the variable's name, rather than found out when telemetry is missed.

use std::{fmt, path::PathBuf, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use percent_encoding::percent_decode_str;

use countersign_api::sidecar::Sampling;

use crate::error::Failure;

/// The variable that switches the export on.
pub const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Of the traces that the mesh begins, the share that is kept when nothing else is said.
const RATIO: f64 = 0.01;
/// How long one export may take.
const TIMEOUT_MS: u64 = 10_000;
/// How often metrics are exported.
const METRICS_EVERY_MS: u64 = 60_000;
/// How long spans gather at most before they are exported.
const SPANS_EVERY_MS: u64 = 5_000;

/// Everything about the export.
#[derive(Debug)]
pub struct Settings {
    /// Where spans go; `None`: nowhere.
    pub traces: Option<Signal>,
    /// Where metrics go; `None`: nowhere.
    pub metrics: Option<Signal>,
    /// Which traces are kept.
    pub sampling: Sampling,
    /// How often metrics are exported.
    pub metrics_every: Duration,
    /// How long spans gather at most.
    pub spans_every: Duration,
    /// What this process calls itself.
    pub service_name: Option<String>,
    /// Said of every resource.
    pub resource: Vec<(String, String)>,
}

/// Where one kind of telemetry goes, and how.
#[derive(Clone)]
pub struct Signal {
    /// The collector; with the path, when it is asked over HTTP.
    pub url: Uri,
    /// How it is asked.
    pub protocol: Protocol,
    /// Sent with every request; may be credentials.
    pub headers: HeaderMap,
    /// How long one export may take.
    pub timeout: Duration,
    /// A file of certificates that may have signed the collector's.
    pub certificate: Option<PathBuf>,
}

/// How a collector is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// OTLP/gRPC.
    Grpc,
    /// OTLP/HTTP with protobuf bodies.
    Http,
}

// Headers may be credentials.
impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.headers.keys().collect();
        let (url, protocol) = (&self.url, &self.protocol);
        f.debug_struct("Signal").field("url", url).field("protocol", protocol).field("headers", &names).finish()
    }
}

impl Settings {
    /// Reads the variables that `get` knows; `None` when nobody asked for an export.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Failure> {
        let get = |name: &str| get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        if get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let traces = signal(&get, "TRACES", "v1/traces")?;
        let metrics = signal(&get, "METRICS", "v1/metrics")?;
        if traces.is_none() && metrics.is_none() {
            return Ok(None);
        }
        let every = |name, default| milliseconds(&get, &[name], default).map(Duration::from_millis);
        Ok(Some(Self {
            traces,
            metrics,
            sampling: sampling(&get)?,
            metrics_every: every("OTEL_METRIC_EXPORT_INTERVAL", METRICS_EVERY_MS)?,
            spans_every: every("OTEL_BSP_SCHEDULE_DELAY", SPANS_EVERY_MS)?,
            service_name: get("OTEL_SERVICE_NAME"),
            resource: match get("OTEL_RESOURCE_ATTRIBUTES") {
                Some(given) => pairs("OTEL_RESOURCE_ATTRIBUTES", &given)?,
                None => Vec::new(),
            },
        }))
    }
}

/// One kind of telemetry: its own variables come before those of all kinds.
fn signal(get: &impl Fn(&str) -> Option<String>, kind: &str, path: &str) -> Result<Option<Signal>, Failure> {
    let name = |what: &str| format!("OTEL_EXPORTER_OTLP_{kind}_{what}");
    let either = |what: &str| {
        let (own, all) = (name(what), format!("OTEL_EXPORTER_OTLP_{what}"));
        get(&own).map(|value| (own, value)).or_else(|| get(&all).map(|value| (all, value)))
    };
    let exporter = format!("OTEL_{kind}_EXPORTER");
    match get(&exporter).as_deref() {
        None | Some("otlp") => {}
        Some("none") => return Ok(None),
        Some(other) => return Err(unknown(&exporter, other, "`otlp` or `none`")),
    }
    let Some((variable, given)) = either("ENDPOINT") else { return Ok(None) };
    let protocol = match either("PROTOCOL").as_ref().map(|(name, value)| (name, value.as_str())) {
        None | Some((_, "grpc")) => Protocol::Grpc,
        Some((_, "http/protobuf")) => Protocol::Http,
        Some((name, other)) => return Err(unknown(name, other, "`grpc` or `http/protobuf`")),
    };
    let no_url = || {
        unknown(&variable, &given, "the URL of a collector, such as `http://localhost:4317`")
            .help(format!("unset {variable} to export nothing"))
    };
    let url: Uri = given.parse().map_err(|_| no_url())?;
    if !matches!(url.scheme_str(), Some("http" | "https")) || url.authority().is_none() {
        return Err(no_url());
    }
    // The endpoint of one kind is used as it is; to that of all kinds the path of the kind is added.
    let url = match protocol {
        Protocol::Http if variable == ENDPOINT => {
            format!("{}/{path}", given.trim_end_matches('/')).parse().map_err(|_| no_url())?
        }
        Protocol::Http | Protocol::Grpc => url,
    };
    let mut headers = HeaderMap::new();
    if let Some((variable, given)) = either("HEADERS") {
        for (name, value) in pairs(&variable, &given)? {
            // What is wrong is said without the value: it may be a secret.
            let wrong = || Failure::usage(format!("{variable} has a header `{name}` that HTTP cannot carry"));
            let key: HeaderName = name.to_ascii_lowercase().parse().map_err(|_| wrong())?;
            let mut value = HeaderValue::try_from(value).map_err(|_| wrong())?;
            value.set_sensitive(true);
            headers.insert(key, value);
        }
    }
    let timeout = milliseconds(get, &[name("TIMEOUT").as_str(), "OTEL_EXPORTER_OTLP_TIMEOUT"], TIMEOUT_MS)?;
    let certificate = either("CERTIFICATE").map(|(_, path)| PathBuf::from(path));
    Ok(Some(Signal { url, protocol, headers, timeout: Duration::from_millis(timeout), certificate }))
}

fn sampling(get: &impl Fn(&str) -> Option<String>) -> Result<Sampling, Failure> {
    const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
    const ARGUMENT: &str = "OTEL_TRACES_SAMPLER_ARG";
    let ratio = |default: f64| match get(ARGUMENT) {
        None => Ok(default),
        Some(given) => match given.parse::<f64>() {
            Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
            _ => Err(unknown(ARGUMENT, &given, "a number from 0 to 1")),
        },
    };
    let (follow_parent, ratio) = match get(SAMPLER).as_deref() {
        None => (true, ratio(RATIO)?),
        Some("parentbased_traceidratio") => (true, ratio(1.0)?),
        Some("parentbased_always_on") => (true, 1.0),
        Some("parentbased_always_off") => (true, 0.0),
        Some("traceidratio") => (false, ratio(1.0)?),
        Some("always_on") => (false, 1.0),
        Some("always_off") => (false, 0.0),
        Some(other) => {
            let known = "`always_on`, `always_off`, `traceidratio`, or one of these after `parentbased_`";
            return Err(unknown(SAMPLER, other, known));
        }
    };
    Ok(Sampling { follow_parent, ratio })
}

fn milliseconds(get: &impl Fn(&str) -> Option<String>, names: &[&str], default: u64) -> Result<u64, Failure> {
    for name in names {
        if let Some(given) = get(name) {
            let parsed = given.parse().ok().filter(|ms| (1..=86_400_000).contains(ms));
            return parsed.ok_or_else(|| unknown(name, &given, "milliseconds, at most a day"));
        }
    }
    Ok(default)
}

/// `key=value` pairs with commas between them, values percent-encoded.
fn pairs(variable: &str, given: &str) -> Result<Vec<(String, String)>, Failure> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        Some((key.trim().to_owned(), value.into_owned())).filter(|(key, _)| !key.is_empty())
    };
    let parts = given.split(',').filter(|part| !part.trim().is_empty());
    parts.map(pair).collect::<Option<_>>().ok_or_else(|| {
        Failure::usage(format!("did not understand {variable}")).help("such as `key=value,other=a%20value`")
    })
}

fn unknown(variable: &str, given: &str, known: &str) -> Failure {
    Failure::usage(format!("did not understand {variable}=`{given}`")).help(format!("it must be {known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &[(&str, &str)]) -> Result<Option<Settings>, Failure> {
        let given: Vec<(String, String)> = given.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Settings::read(|name| given.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
    }

    const HERE: (&str, &str) = (ENDPOINT, "http://localhost:4317");

    #[test]
    fn nothing_is_exported_unless_an_endpoint_is_given() {
        for given in [
            vec![],
            vec![(ENDPOINT, "")],
            vec![("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
            vec![HERE, ("OTEL_SDK_DISABLED", "true")],
            vec![HERE, ("OTEL_TRACES_EXPORTER", "none"), ("OTEL_METRICS_EXPORTER", "none")],
        ] {
            assert!(read(&given).unwrap().is_none(), "{given:?}");
        }
        let only_spans = read(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://localhost:4317")]).unwrap().unwrap();
        assert!(only_spans.traces.is_some() && only_spans.metrics.is_none());
    }

    #[test]
    fn the_sampler_is_what_open_telemetry_calls_it() {
        for (sampler, argument, follow_parent, ratio) in [
            ("", "", true, RATIO),
            ("", "0.5", true, 0.5),
            ("parentbased_traceidratio", "0.25", true, 0.25),
            ("parentbased_traceidratio", "", true, 1.0),
            ("parentbased_always_on", "0.5", true, 1.0),
            ("parentbased_always_off", "", true, 0.0),
            ("traceidratio", "0.25", false, 0.25),
            ("always_on", "", false, 1.0),
            ("always_off", "", false, 0.0),
        ] {
            let given = [HERE, ("OTEL_TRACES_SAMPLER", sampler), ("OTEL_TRACES_SAMPLER_ARG", argument)];
            let sampling = read(&given).unwrap().unwrap().sampling;
            assert_eq!(sampling, Sampling { follow_parent, ratio }, "{given:?}");
        }
    }

    #[test]
    fn the_path_is_added_to_the_endpoint_of_all_kinds_and_to_no_other() {
        let http = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        for (given, url) in [
            (vec![HERE], "http://localhost:4317/"),
            (vec![HERE, http], "http://localhost:4317/v1/traces"),
            (vec![(ENDPOINT, "https://c.example/otlp/"), http], "https://c.example/otlp/v1/traces"),
            (vec![HERE, http, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://t.example/x")], "http://t.example/x"),
        ] {
            assert_eq!(read(&given).unwrap().unwrap().traces.unwrap().url.to_string(), url, "{given:?}");
        }
    }

    #[test]
    fn headers_are_decoded_and_not_shown() {
        let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20s3cret, x-tenant = a");
        let settings = read(&[HERE, headers]).unwrap().unwrap();
        let sent = &settings.metrics.as_ref().unwrap().headers;
        assert_eq!(
            (&sent["authorization"], &sent["x-tenant"]),
            (&"Bearer s3cret".try_into().unwrap(), &"a".try_into().unwrap())
        );
        assert!(!format!("{settings:?}").contains("s3cret"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (name, value) in [
            (ENDPOINT, "localhost:4317"),
            (ENDPOINT, "grpc://localhost"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "no-value"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_TRACES_SAMPLER_ARG", "2"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_RESOURCE_ATTRIBUTES", "novalue"),
        ] {
            let failure = read(&[(name, value), HERE]).unwrap_err().to_string();
            assert!(failure.contains(name), "{failure}");
        }
    }
}
