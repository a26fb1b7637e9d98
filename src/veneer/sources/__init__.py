"""Sources: the configured places that store paths come from.

``base`` is the contract that every source fulfils and that tests/conformance checks. ``options`` reads a source's URL,
``chain`` puts several sources in order, ``compression`` undoes a NAR's compression while it is read.

``object_store`` is the source behind http(s), file, s3, gs and az URLs. It gives answers their meaning; how bytes come is
below it: ``transport`` (contract and the one failure type), ``stored_objects`` (obstore), ``plain_http`` (standard library,
for what obstore cannot do), ``http_place`` (which of the two), ``directory``, ``nar_stream`` (a NAR through interruptions), ``retry``,
``bodies``, ``credentials``, ``workers`` (threads that do not hold up the process's end).

Nothing here trusts what a source says; sizes and times are bounded, and no secret is in a message.
"""
