//! A page of OpenMetrics text as OTLP metrics: the very names, labels and numbers that Prometheus reads, so that the two
//! ways to watch a mesh cannot differ. Histograms lose nothing but their form: buckets that add up become buckets that
//! do not.

use opentelemetry_proto::tonic::{
    common::v1::KeyValue,
    metrics::v1::{
        AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint, Sum, metric::Data,
        number_data_point::Value,
    },
};

use countersign_api::sidecar::Metrics;

use super::resource::text;

/// Reads a page of our own. What cannot be read is left out: a page is written by the same program.
pub fn of_page(counted: &Metrics) -> Vec<Metric> {
    let mut metrics = Vec::new();
    let mut family = Family::default();
    for line in counted.page.lines() {
        match line.strip_prefix("# ") {
            Some(about) => {
                let mut words = about.splitn(3, ' ');
                let (Some(what), Some(name), rest) = (words.next(), words.next(), words.next().unwrap_or_default())
                else {
                    continue;
                };
                if name != family.name {
                    metrics.extend(std::mem::take(&mut family).finish());
                    name.clone_into(&mut family.name);
                }
                match what {
                    "HELP" => rest.trim_end_matches('.').clone_into(&mut family.help),
                    "TYPE" => family.kind = Kind::parse(rest),
                    _ => {}
                }
            }
            None => {
                if let Some((name, labels, value)) = sample(line) {
                    family.add(name, labels, value, counted);
                }
            }
        }
    }
    metrics.extend(family.finish());
    metrics
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Kind {
    #[default]
    Gauge,
    Counter,
    Histogram,
}

impl Kind {
    fn parse(given: &str) -> Self {
        match given {
            "counter" => Self::Counter,
            "histogram" => Self::Histogram,
            _ => Self::Gauge,
        }
    }
}

type Labels = Vec<(String, String)>;

/// The samples under one `# TYPE`.
#[derive(Default)]
struct Family {
    name: String,
    help: String,
    kind: Kind,
    numbers: Vec<NumberDataPoint>,
    histograms: Vec<(Labels, HistogramDataPoint)>,
}

impl Family {
    fn add(&mut self, name: &str, labels: Labels, value: &str, counted: &Metrics) {
        let start_time_unix_nano = counted.began_ns;
        if self.kind == Kind::Histogram {
            self.add_to_histogram(name, labels, value, counted);
            return;
        }
        let value = match (value.parse::<i64>(), value.parse::<f64>()) {
            (Ok(whole), _) => Value::AsInt(whole),
            (_, Ok(number)) => Value::AsDouble(number),
            _ => return,
        };
        self.numbers.push(NumberDataPoint {
            attributes: attributes(labels),
            start_time_unix_nano: if self.kind == Kind::Counter { start_time_unix_nano } else { 0 },
            time_unix_nano: counted.at_ns,
            value: Some(value),
            ..NumberDataPoint::default()
        });
    }

    fn add_to_histogram(&mut self, name: &str, labels: Labels, value: &str, counted: &Metrics) {
        let (bounds, labels): (Vec<_>, Vec<_>) = labels.into_iter().partition(|(key, _)| key == "le");
        let place = self.histograms.iter().position(|(of, _)| *of == labels).unwrap_or_else(|| {
            let point = HistogramDataPoint {
                attributes: attributes(labels.clone()),
                start_time_unix_nano: counted.began_ns,
                time_unix_nano: counted.at_ns,
                ..HistogramDataPoint::default()
            };
            self.histograms.push((labels, point));
            self.histograms.len() - 1
        });
        let point = &mut self.histograms[place].1;
        match name.strip_prefix(&*self.name) {
            Some("_sum") => point.sum = value.parse().ok(),
            Some("_count") => point.count = value.parse().unwrap_or_default(),
            Some("_bucket") => {
                let until_here: u64 = value.parse().unwrap_or_default();
                let before: u64 = point.bucket_counts.iter().sum();
                point.bucket_counts.push(until_here.saturating_sub(before));
                // The last bucket has no bound.
                let bound = bounds.first().and_then(|(_, bound)| bound.parse::<f64>().ok());
                point.explicit_bounds.extend(bound.filter(|bound| bound.is_finite()));
            }
            _ => {}
        }
    }

    fn finish(self) -> Option<Metric> {
        let Self { mut name, help: description, kind, numbers: data_points, histograms } = self;
        if data_points.is_empty() && histograms.is_empty() {
            return None;
        }
        let aggregation_temporality = AggregationTemporality::Cumulative as i32;
        let data = match kind {
            Kind::Gauge => Data::Gauge(Gauge { data_points }),
            Kind::Counter => {
                name.push_str("_total"); // as its samples are called
                Data::Sum(Sum { data_points, aggregation_temporality, is_monotonic: true })
            }
            Kind::Histogram => {
                let data_points = histograms.into_iter().map(|(_, point)| point).collect();
                Data::Histogram(Histogram { data_points, aggregation_temporality })
            }
        };
        let unit = match name.trim_end_matches("_total") {
            seconds if seconds.ends_with("_seconds") => "s",
            bytes if bytes.ends_with("_bytes") => "By",
            _ => "",
        };
        Some(Metric { name, description, unit: unit.into(), metadata: Vec::new(), data: Some(data) })
    }
}

fn attributes(labels: Labels) -> Vec<KeyValue> {
    labels.into_iter().map(|(key, value)| text(&key, value)).collect()
}

/// `name{key="value",…} number`.
fn sample(line: &str) -> Option<(&str, Labels, &str)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (key, after) = rest.trim_start_matches(',').split_once("=\"")?;
            let mut value = String::new();
            let mut letters = after.char_indices();
            let end = loop {
                match letters.next()? {
                    (at, '"') => break at,
                    (_, '\\') => value.push(match letters.next()?.1 {
                        'n' => '\n',
                        other => other,
                    }),
                    (_, other) => value.push(other),
                }
            };
            labels.push((key.to_owned(), value));
            rest = &after[end + 1..];
        }
        rest = &rest[1..];
    }
    Some((name, labels, rest.split_whitespace().next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = r#"# HELP x_exchanges Exchanges begun.
# TYPE x_exchanges counter
x_exchanges_total{direction="inbound",odd="a\"b\\c\nd}"} 4
x_exchanges_total{direction="outbound",odd=""} 18446744073709551615
# HELP x_age_seconds Since then.
# TYPE x_age_seconds gauge
x_age_seconds 0.25
# HELP x_took_seconds From head to end.
# TYPE x_took_seconds histogram
# UNIT x_took_seconds seconds
x_took_seconds_sum{direction="inbound"} 1.5
x_took_seconds_count{direction="inbound"} 7
x_took_seconds_bucket{le="0.001",direction="inbound"} 2
x_took_seconds_bucket{le="1.0",direction="inbound"} 6
x_took_seconds_bucket{le="+Inf",direction="inbound"} 7
x_took_seconds_sum{direction="outbound"} 0.0
x_took_seconds_count{direction="outbound"} 0
x_took_seconds_bucket{le="0.001",direction="outbound"} 0
x_took_seconds_bucket{le="1.0",direction="outbound"} 0
x_took_seconds_bucket{le="+Inf",direction="outbound"} 0
# EOF
"#;

    #[test]
    fn a_page_becomes_the_same_metrics() {
        let metrics = of_page(&Metrics { page: PAGE.into(), began_ns: 1, at_ns: 2 });
        let names: Vec<_> = metrics.iter().map(|metric| (metric.name.as_str(), metric.unit.as_str())).collect();
        assert_eq!(names, [("x_exchanges_total", ""), ("x_age_seconds", "s"), ("x_took_seconds", "s")]);
        assert_eq!(metrics[0].description, "Exchanges begun");
        let Some(Data::Sum(sum)) = &metrics[0].data else { panic!("{:?}", metrics[0]) };
        assert!(sum.is_monotonic);
        let first = &sum.data_points[0];
        assert_eq!((first.value, first.start_time_unix_nano, first.time_unix_nano), (Some(Value::AsInt(4)), 1, 2));
        let labels = [text("direction", "inbound".into()), text("odd", "a\"b\\c\nd}".into())];
        assert_eq!(first.attributes, labels);
        let Some(Data::Gauge(gauge)) = &metrics[1].data else { panic!("{:?}", metrics[1]) };
        assert_eq!(gauge.data_points[0].value, Some(Value::AsDouble(0.25)));
        let Some(Data::Histogram(histogram)) = &metrics[2].data else { panic!("{:?}", metrics[2]) };
        let [inbound, outbound] = &histogram.data_points[..] else { panic!("{histogram:?}") };
        assert_eq!((inbound.count, inbound.sum), (7, Some(1.5)));
        assert_eq!((&inbound.bucket_counts[..], &inbound.explicit_bounds[..]), (&[2, 4, 1][..], &[0.001, 1.0][..]));
        assert_eq!((outbound.count, &outbound.bucket_counts[..]), (0, &[0, 0, 0][..]));
    }

    #[test]
    fn a_torn_page_is_read_as_far_as_it_goes() {
        for end in 0..PAGE.len() {
            of_page(&Metrics { page: PAGE[..end].into(), began_ns: 0, at_ns: 0 });
        }
    }
}
