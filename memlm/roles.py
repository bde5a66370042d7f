"""Roles of tokens, as data writes them into ``doc_ids`` and memories of documents read them.

A token of a document has the document's number, above 0. Any other token has one of these: it is of a query, which
chooses documents; of a response; or of a template, which stands before everything else in a sample.
"""

QUERY, RESPONSE, TEMPLATE = 0, -1, -2
