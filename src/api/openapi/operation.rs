//! One operation of the API: its route and its description in one value, so that no route lacks one.

use axum::routing::MethodRouter;
use http::Method;
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::super::state::ApiState;
use crate::code::Code;

/// Makes a schema, and puts what it refers to into the document.
pub type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

/// Where a parameter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterPlace {
    /// A segment of the path.
    Path,
    /// A pair of the query.
    Query,
    /// A header.
    Header,
}

/// A parameter of an operation.
#[derive(Clone, Copy)]
pub struct Parameter {
    /// Where it is.
    pub place: ParameterPlace,
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    /// What it may be.
    pub schema: MakeSchema,
}

/// A body, of a request or an answer.
#[derive(Clone, Copy)]
pub struct Content {
    /// What it is.
    pub about: &'static str,
    /// Its media types, each with the shape of its values.
    pub types: &'static [(&'static str, MakeSchema)],
    /// False where a request may leave it out.
    pub required: bool,
}

/// An operation: what the router needs to serve it, and what a client has to know of it.
pub struct ApiOperation {
    /// Method of its requests; GET takes HEAD too.
    pub method: Method,
    /// Path, with its parameters in braces.
    pub path: &'static str,
    /// Its name: what a generated client calls it.
    pub id: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Its parameters.
    pub parameters: Vec<Parameter>,
    /// What a request carries.
    pub body: Option<Content>,
    /// What a success carries.
    pub answer: Content,
    /// Codes of the problems that are its own; those of tokens are added where one is needed.
    pub codes: Vec<(u16, Code)>,
    /// Serves it.
    pub handler: MethodRouter<ApiState>,
}

/// Returns the schema of a type, as a reference.
pub fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

impl ApiOperation {
    /// Returns an operation that reads.
    pub fn get(
        path: &'static str,
        id: &'static str,
        summary: &'static str,
        answer: Content,
        handler: MethodRouter<ApiState>,
    ) -> Self {
        let (parameters, codes) = (Vec::new(), Vec::new());
        Self { method: Method::GET, path, id, summary, parameters, body: None, answer, codes, handler }
    }

    /// Returns an operation that changes something.
    pub fn post(
        path: &'static str,
        id: &'static str,
        summary: &'static str,
        body: Content,
        answer: Content,
        handler: MethodRouter<ApiState>,
    ) -> Self {
        let get = Self::get(path, id, summary, answer, handler);
        Self { method: Method::POST, body: Some(body), ..get }.fails(&[Code::InvalidArgument, Code::TooLarge])
    }

    /// Returns it with these parameters too.
    pub fn takes(mut self, parameters: &[Parameter]) -> Self {
        self.parameters.extend(parameters);
        self
    }

    /// Returns it with problems of these codes too.
    pub fn fails(mut self, codes: &[Code]) -> Self {
        self.codes.extend(codes.iter().map(|code| (code.status().as_u16(), *code)));
        self
    }

    /// Returns it with a problem of a code that has another status here.
    pub fn fails_as(mut self, status: u16, code: Code) -> Self {
        self.codes.push((status, code));
        self
    }
}
