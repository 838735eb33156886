# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2034
# The machine's variables, for you to edit. Variables only: what is done with them is in function.sh.

IPs=('127.0.0.1')                                   # IPs of all nodes in rank order, separated by spaces
master_port=29500                                   # of the first node, where the nodes meet: one for each job
rendezvous_timeout_s=120                            # how long a node waits for the others
job_secret=''                                       # several nodes: a long random word, the same on all of them
cann_path=''                                        # Ascend only: CANN's folder; '' looks where its installer puts it
driver_path=/usr/local/Ascend/driver                # Ascend only: where the NPU driver is installed
