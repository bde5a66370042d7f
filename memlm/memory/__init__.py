"""The memories, one file each. ``base`` is the slot that they fit.

Files:

    base                the slot: ``SequenceMixer``, ``MixerOutput``, ``Dims``
    rows                the positions of a call's tokens: ``Rows``, computed once per call
    stretches           sequence parallelism: rows cut over processes
    joined              memories along documents that go on from other processes
    state               the state of a mixer: dicts of tensors and of dicts, and their names in a file
    parts               parts that several memories share: gates of two branches, one softmax of several, starts
    rope                rotary positions of an extended context
    kv                  keys and values that grow by a token per call, without copies of their past
    attention           full and sliding-window attention, persistent tokens, backends
    titans              Titans' neural memory as a part of a layer
    titans_lmm          Titans' memory alone
    titans_mac          Titans' memory as a context of attention
    titans_mag          Titans' memory as a gate beside attention
    titans_mal          Titans' memory as a layer before attention
    titans_tnt          two levels of Titans' memory
    two_rate            a fast memory of Titans, and a slow one that its chunks write
    lact                attention in a window, and fast weights written once per chunk
    rules               the update rules of linear memories
    recurrence          from projections to reads by a rule, and the layer that hosts one
    linear_attention, retention, simple_gla, gla, delta_net, gated_delta_net  one rule each
    kda, comba, momentum_delta_net  later delta rules
    mom                 mixture of memories: router and balance
    chunk_sparse        attention to a window and to chosen chunks of the past
    eidetic             attention to a window and to the tokens before it that surprised most
    bmojo               the same, and a recurrence behind the window
    msa                 Memory Sparse Attention
"""
