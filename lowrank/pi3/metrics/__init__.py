"""pi3.metrics"""
