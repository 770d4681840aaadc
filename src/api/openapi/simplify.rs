//! Says the same in the forms that generators of clients know: schemas that come from Rust's types use more of JSON Schema.

use serde_json::{Map, Value, json};

/// Simplifies a schema and all schemas in it.
pub fn simplify(schema: &mut Value) {
    match schema {
        Value::Array(all) => all.iter_mut().for_each(simplify),
        Value::Object(members) => {
            members.values_mut().for_each(simplify);
            words_as_enum(members);
            any_key(members);
            whole_alternatives(members);
            if let Some(Value::String(description)) = members.get_mut("description") {
                *description = plain(description);
            }
        }
        _ => {}
    }
}

/// Makes one `enum` of alternatives that are words, each with its own description.
fn words_as_enum(schema: &mut Map<String, Value>) {
    let Some(Value::Array(alternatives)) = schema.get("oneOf") else { return };
    let (mut words, mut lines) = (Vec::new(), Vec::new());
    for alternative in alternatives {
        match (&alternative["const"], &alternative["enum"]) {
            (Value::String(word), _) => {
                words.push(json!(word));
                lines.extend(alternative["description"].as_str().map(|about| format!("- `{word}`: {about}")));
            }
            (_, Value::Array(more)) => words.extend(more.iter().cloned()),
            _ => return one_word_enums(schema),
        }
    }
    schema.remove("oneOf");
    let about = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    let description = format!("{about}\n\n{}", lines.join("\n"));
    schema.extend([("type".into(), json!("string")), ("enum".into(), words.into())]);
    schema.insert("description".into(), description.trim().into());
}

/// Makes enums of the words among other alternatives: generated clients take a `const` for the only one.
fn one_word_enums(schema: &mut Map<String, Value>) {
    for alternative in schema.get_mut("oneOf").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(word) = alternative.as_object_mut().and_then(|members| members.remove("const")) {
            alternative["enum"] = json!([word]);
        }
    }
}

/// Lets a map have any key, where its keys' type says which they are: generators know no `patternProperties`.
fn any_key(schema: &mut Map<String, Value>) {
    let Some(Value::Object(patterns)) = schema.get("patternProperties") else { return };
    if let (1, Some(values)) = (patterns.len(), patterns.values().next().cloned()) {
        schema.remove("patternProperties");
        schema.insert("additionalProperties".into(), values);
    }
}

/// Gives each alternative of a tagged enum the members that all have in common.
fn whole_alternatives(schema: &mut Map<String, Value>) {
    let Some(Value::Object(common)) = schema.get("properties").cloned() else { return };
    let required = schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
    let Some(Value::Array(alternatives)) = schema.get_mut("oneOf") else { return };
    for alternative in alternatives {
        if let Some(Value::Object(members)) = alternative.get_mut("properties") {
            members.extend(common.clone());
        }
        if let Some(Value::Array(own)) = alternative.get_mut("required") {
            own.extend(required.clone());
        }
    }
    schema.remove("properties");
    schema.remove("required");
}

/// Gives the alternatives of a tagged enum their names: `local_hold` of an `Announcement` is a `LocalHoldAnnouncement`.
pub fn name_alternatives(name: &str, schema: &mut Value) {
    let Some(Value::Array(alternatives)) = schema.get_mut("oneOf") else { return };
    for alternative in alternatives {
        let members = alternative["properties"].as_object().into_iter().flat_map(Map::values);
        let tag = members.into_iter().find_map(|member| member["const"].as_str().map(ToString::to_string));
        if let Some(tag) = tag {
            let words = tag.split('_').map(|word| word[..1].to_uppercase() + &word[1..]);
            alternative["title"] = format!("{}{name}", words.collect::<String>()).into();
        }
    }
}

/// Returns a doc comment without its line breaks inside of paragraphs, and without links into the code.
fn plain(text: &str) -> String {
    let text = text.replace("[`", "`").replace("`]", "`");
    let lines = text.split('\n').fold(String::new(), |mut joined, line| {
        let begins = line.is_empty() || line.starts_with("- ") || joined.is_empty() || joined.ends_with('\n');
        joined.push_str(if begins && !joined.is_empty() { "\n" } else { " " });
        joined.push_str(line);
        joined
    });
    lines.trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn simplified(mut schema: Value) -> Value {
        simplify(&mut schema);
        schema
    }

    #[test]
    fn alternatives_that_are_words_become_an_enum() {
        let words = json!({ "description": "A [`Status`],\nof two.", "oneOf": [
            { "type": "string", "const": "on", "description": "It\nruns." }, { "type": "string", "enum": ["off", "out"] },
        ]});
        let expected = json!({
            "description": "A `Status`, of two.\n\n- `on`: It runs.", "type": "string", "enum": ["on", "off", "out"],
        });
        assert_eq!(simplified(words), expected);
        let mixed = json!({ "oneOf": [{ "const": "on" }, { "type": "object" }] });
        assert_eq!(simplified(mixed), json!({ "oneOf": [{ "enum": ["on"] }, { "type": "object" }] }));
    }

    #[test]
    fn an_alternative_has_the_members_that_all_have() {
        let hold =
            json!({ "type": "object", "properties": { "event": { "const": "local_hold" } }, "required": ["event"] });
        let tagged = json!({ "oneOf": [hold], "properties": { "at": {} }, "required": ["at"], "type": "object" });
        let mut whole = json!({ "type": "object", "properties": { "event": { "const": "local_hold" }, "at": {} },
            "required": ["event", "at"] });
        let mut schema = simplified(tagged);
        assert_eq!(schema, json!({ "oneOf": [whole], "type": "object" }));
        name_alternatives("Announcement", &mut schema);
        whole["title"] = "LocalHoldAnnouncement".into();
        assert_eq!(schema["oneOf"][0], whole);
    }

    #[test]
    fn a_map_may_have_any_key() {
        let map = json!({ "type": "object", "patternProperties": { "^a$": { "type": "number" } }, "additionalProperties": false });
        let expected = json!({ "type": "object", "additionalProperties": { "type": "number" } });
        assert_eq!(simplified(json!({ "items": map })), json!({ "items": expected }));
    }
}
