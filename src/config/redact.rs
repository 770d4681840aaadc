//! A node's file without its secrets: for backups, which travel further than the file does.

use toml::{Table, Value};

/// Stands in for a secret.
const LEFT_OUT: &str = "(left out)";
/// The properties of librdkafka that are kept; any other may hold a password or a key.
const KAFKA_KEPT: [&str; 3] = ["security.protocol", "sasl.mechanism", "sasl.mechanisms"];

/// Returns a node's file without passwords, keys and comments. Names of files stay, such as that of the tokens.
pub fn without_secrets(text: &str) -> Result<String, toml::de::Error> {
    let mut file: Table = text.parse()?;
    if let Some(Value::Table(properties)) = file.get_mut("kafka").and_then(|kafka| kafka.get_mut("properties")) {
        for (_, value) in properties.iter_mut().filter(|(name, _)| !KAFKA_KEPT.contains(&name.as_str())) {
            *value = Value::String(LEFT_OUT.into());
        }
    }
    file.iter_mut().for_each(|(_, value)| clean(value));
    Ok(format!("# Comments and secrets are left out.\n{file}"))
}

fn clean(value: &mut Value) {
    match value {
        Value::String(text) => *text = cleaned(text),
        Value::Array(values) => values.iter_mut().for_each(clean),
        Value::Table(table) => table.iter_mut().for_each(|(_, value)| clean(value)),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) => {}
    }
}

/// Returns a text without what a URL may hold of secrets: what comes before `@`, and the query.
fn cleaned(text: &str) -> String {
    if text.contains("-----BEGIN") {
        return LEFT_OUT.into();
    }
    let Some((scheme, rest)) = text.split_once("://") else { return text.into() };
    let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, _)| (rest, "?left-out"));
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://left-out@{host}{query}"),
        None => format!("{scheme}://{rest}{query}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_keys_and_comments_are_left_out_and_everything_else_stays() {
        let text = r#"
[node]
id = "a"                 # hunter1
data_dir = "data/node-a"
[listen]
data = "127.0.0.1:8081"
[api]
tokens_file = "config/tokens"
[redis]
url = "redis://user:hunter2@10.0.0.1:6379/1?password=hunter3"
[kafka]
bootstrap = "k:9092"
[kafka.properties]
"security.protocol" = "SASL_SSL"
"sasl.password" = "hunter4"
"ssl.key.pem" = "-----BEGIN PRIVATE KEY-----hunter5"
"#;
        let clean = without_secrets(text).unwrap();
        assert!(!clean.contains("hunter") && !clean.contains("user"), "{clean}");
        let file: Table = clean.parse().unwrap();
        assert_eq!(file["node"]["data_dir"].as_str(), Some("data/node-a"));
        assert_eq!(file["api"]["tokens_file"].as_str(), Some("config/tokens"));
        assert_eq!(file["redis"]["url"].as_str(), Some("redis://left-out@10.0.0.1:6379/1?left-out"));
        assert_eq!(file["kafka"]["properties"]["security.protocol"].as_str(), Some("SASL_SSL"));
        assert_eq!(file["kafka"]["properties"]["sasl.password"].as_str(), Some(LEFT_OUT));
    }

    #[test]
    fn each_example_of_a_node_s_file_can_be_cleaned_and_read_again() {
        let clean = without_secrets(include_str!("../../config/node-a.toml")).unwrap();
        let path = std::path::Path::new("node-a.toml");
        assert_eq!(super::super::node::NodeConfig::parse(&clean, path).unwrap().id.as_str(), "a");
    }
}
