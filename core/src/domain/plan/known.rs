//! Reading what another build wrote: keys that this build doesn't know are left out, and named.
//!
//! The types of a file refuse unknown keys, since a person may have mistyped one. A record of the log was checked by the build that
//! wrote it: what is unknown in it is new, not wrong. A struct tells its deserializer which keys it knows, so that one reader
//! serves every type.

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Error, Map, Value};

/// Returns what `value` holds as far as `T` knows its keys, and the paths of the keys that `T` doesn't know, such as
/// `spec.routing.salt`.
pub fn read<T: DeserializeOwned>(value: &Value) -> Result<(T, Vec<String>), Error> {
    let mut unknown = Vec::new();
    let read = T::deserialize(Known { value, path: String::new(), unknown: &mut unknown })?;
    Ok((read, unknown))
}

/// A value, its path, and the unknown keys so far.
struct Known<'v, 'u> {
    value: &'v Value,
    path: String,
    unknown: &'u mut Vec<String>,
}

/// The entries of an object or the elements of a list, each read like the whole.
struct Parts<'v, 'u, I> {
    rest: I,
    value: Option<(String, &'v Value)>,
    unknown: &'u mut Vec<String>,
}

impl<'de> Known<'de, '_> {
    fn object<V: Visitor<'de>>(
        self,
        object: &'de Map<String, Value>,
        known: Option<&[&str]>,
        visitor: V,
    ) -> Result<V::Value, Error> {
        let mut entries = Vec::new();
        for (key, value) in object {
            let path = if self.path.is_empty() { key.clone() } else { format!("{}.{key}", self.path) };
            match known.is_none_or(|known| known.contains(&key.as_str())) {
                true => entries.push((key.as_str(), path, value)),
                false => self.unknown.push(path),
            }
        }
        visitor.visit_map(Parts { rest: entries.into_iter(), value: None, unknown: self.unknown })
    }
}

impl<'de> Deserializer<'de> for Known<'de, '_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Object(object) => self.object(object, None, visitor),
            Value::Array(list) => {
                let path = &self.path;
                let elements: Vec<_> =
                    list.iter().enumerate().map(|(i, value)| (format!("{path}[{i}]"), value)).collect();
                visitor.visit_seq(Parts { rest: elements.into_iter(), value: None, unknown: self.unknown })
            }
            Value::String(text) => visitor.visit_str(text),
            Value::Bool(is_true) => visitor.visit_bool(*is_true),
            Value::Null => visitor.visit_unit(),
            Value::Number(number) => number.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.value {
            Value::Object(object) => self.object(object, Some(known), visitor),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.value.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.value.deserialize_enum(name, variants, visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

impl<'de, I: Iterator<Item = (&'de str, String, &'de Value)>> MapAccess<'de> for Parts<'de, '_, I> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, path, value)) = self.rest.next() else { return Ok(None) };
        self.value = Some((path, value));
        let key: StrDeserializer<'_, Error> = key.into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let (path, value) = self.value.take().expect("a key comes before its value");
        seed.deserialize(Known { value, path, unknown: self.unknown })
    }
}

impl<'de, I: Iterator<Item = (String, &'de Value)>> SeqAccess<'de> for Parts<'de, '_, I> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        let Some((path, value)) = self.rest.next() else { return Ok(None) };
        seed.deserialize(Known { value, path, unknown: self.unknown }).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        name: String,
        #[serde(default)]
        inner: Option<Inner>,
        #[serde(default)]
        list: Vec<Inner>,
        #[serde(default)]
        map: BTreeMap<String, u8>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        share: f64,
        #[serde(default)]
        kind: Kind,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        #[default]
        One,
        Two,
    }

    #[test]
    fn unknown_keys_are_named_at_every_depth_and_the_rest_is_read() {
        let value = json!({
            "name": "n", "new": {"deep": 1}, "map": {"any": 3},
            "inner": {"share": 5, "extra": null},
            "list": [{"share": 0.5, "kind": "two"}, {"share": 1.0, "salt": "x"}],
        });
        let (read, unknown) = super::read::<Outer>(&value).unwrap();
        let two = Inner { share: 0.5, kind: Kind::Two };
        let list = vec![two, Inner { share: 1.0, kind: Kind::One }];
        let inner = Some(Inner { share: 5.0, kind: Kind::One });
        assert_eq!(read, Outer { name: "n".into(), inner, list, map: BTreeMap::from([("any".into(), 3)]) });
        assert_eq!(unknown, ["new", "inner.extra", "list[1].salt"]);
    }

    #[test]
    fn a_value_of_another_shape_is_refused_all_the_same() {
        for wrong in [json!({"name": 7}), json!({"name": "n", "inner": {"kind": "one"}}), json!([]), json!(null)] {
            assert!(super::read::<Outer>(&wrong).is_err(), "{wrong}");
        }
        let unknown_word = json!({"name": "n", "inner": {"share": 1.0, "kind": "three"}});
        assert!(super::read::<Outer>(&unknown_word).unwrap_err().to_string().contains("three"));
    }
}
