"""Questions about a document with LangChain, on a kvcast model: a prompt, the model, a parser, in one chain.

pip install .[integrations], in a checkout
python docs/examples/langchain_chat.py DOCUMENT.txt "What is it about?" [--model smollm2]
"""

import argparse
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from kvcast import Llama, SparseConfig, models
from kvcast.integrations.langchain import ChatKvcast

parser = argparse.ArgumentParser()
parser.add_argument("document", type=Path)
parser.add_argument("questions", nargs="+")
parser.add_argument("--model", default="smollm2")
parser.add_argument("--context", type=int, default=0)
parser.add_argument("--tokens", type=int, default=128)
options = parser.parse_args()

llm = Llama(models.resolve(options.model), n_ctx=options.context, sparse=SparseConfig(budget=512), verbose=False)
prompt = ChatPromptTemplate.from_messages([("system", "Answer from this document.\n\n{document}"), ("human", "{question}")])
chain = prompt | ChatKvcast(client=llm, max_tokens=options.tokens, temperature=0.2) | StrOutputParser()

document = options.document.read_text(encoding="utf-8")
for question in options.questions:  # the document is processed for the first; the others find it in the store
    print(f"> {question}")
    for piece in chain.stream({"document": document, "question": question}):
        print(piece, end="", flush=True)
    print()
llm.close()
